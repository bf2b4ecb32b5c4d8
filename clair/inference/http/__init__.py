"""HTTP below a model behind a URL: our own requests, and the openai library with the same guard.

Imports `core`.
"""
