"""Preference pairs as token ids: sources, chat templates, tokenization.

Imports `console`.
"""
