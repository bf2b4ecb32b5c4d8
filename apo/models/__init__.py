"""Models and adapters: load, merge, and cached tensors of their outputs.

Imports `data`, `distributed` and `packing`.
"""
