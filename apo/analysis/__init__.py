"""What a frozen model's features say of a preference dataset.

Imports `data` and `models`.
"""
