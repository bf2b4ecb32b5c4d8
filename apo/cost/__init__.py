"""What a run needs: memory, FLOPs and time, before any weight is loaded.

Imports `data`, `models` and `packing`.
"""
