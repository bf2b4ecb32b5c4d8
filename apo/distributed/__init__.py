"""Several processes as one run: launch, broadcast, and DeepSpeed's sharded weights.

Imports `console`.
"""
