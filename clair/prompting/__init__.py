"""Prompt templates of reviser and judge, and the parsers of what these models reply.

Imports `core` and `data`.
"""
