"""What a run measures of itself: metrics, guards, token diagnostics, plots, and the diagnosis of a finished run.

Imports `run_dir`, `data` and `losses`.
"""
