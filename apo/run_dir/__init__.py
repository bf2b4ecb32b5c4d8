"""The folder of a training run: its files and its checkpoints.

Imports `distributed`.
"""
