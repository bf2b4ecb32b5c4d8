"""Prompts and preference pairs, the files that hold them, and measures of contrast and duplicates.

Imports `core` and `storage`.
"""
