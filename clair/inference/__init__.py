"""Model clients: one request, one ledger entry, within a rate limit and a budget.

Imports `core`, `storage`, `data` and `ledger`.
"""
