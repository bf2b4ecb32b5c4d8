"""What a run measures while it trains: metrics, guards, token diagnostics, plots, and the diagnosis of its log.

Imports `run_dir`, `data` and `losses`.
"""
