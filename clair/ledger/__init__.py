"""Every reply that was paid for, on disk before anyone reads it; its copy in an object store, and its recovery.

Imports `core` and `storage`.
"""
