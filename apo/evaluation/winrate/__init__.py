"""Win rates by a judge: both orders, verdicts, length control.

Imports `evaluation`.
"""
