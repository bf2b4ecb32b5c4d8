"""Build a dataset folder: prompts through a pipeline of steps, resumable, with an estimate of the cost beforehand.

Imports `core`, `storage`, `data`, `ledger`, `inference` and `prompting`; never `cluster` or `reporting`.
"""
