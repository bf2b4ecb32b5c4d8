"""Win rates by a judge that sees both orders, raw and at equal lengths.

Imports `evaluation`.
"""
