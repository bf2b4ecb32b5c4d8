"""The HTML report of a finished dataset, its sample of pairs, and the decisions of a person who reviews them.

Imports `core`, `storage`, `data` and `pipeline`.
"""
