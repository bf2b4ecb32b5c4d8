"""The cost of a run: memory, FLOPs and time, computed before any weight is loaded.

Imports `data`, `models` and `packing`.
"""
