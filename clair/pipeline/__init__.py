"""A build: prompts through a pipeline of steps into a dataset folder, resumable, with an estimate beforehand.

Imports everything above a model client; never `cluster` or `reporting`.
"""
