"""Pages and samples of a finished dataset, and the decisions of a person who reads them.

Imports `core`, `storage`, `data` and `pipeline`.
"""
