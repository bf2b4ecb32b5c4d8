"""Object stores: conditional writes to a URL, and a lock that one run holds on it.

Imports `core`.
"""
