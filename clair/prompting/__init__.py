"""Prompt templates of reviser and judge, and the parsers of their replies.

Imports `core` and `data`.
"""
