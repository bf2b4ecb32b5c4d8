"""The ledger of paid replies, its replica in an object store, and its recovery from damage.

Imports `core` and `storage`.
"""
