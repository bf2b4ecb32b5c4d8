"""The tokens of a transformers model in this process.

Imports nothing of `clair`.
"""
