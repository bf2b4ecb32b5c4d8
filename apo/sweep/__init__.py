"""Train a grid of recipes, one run per combination, and compare the runs on held-out pairs.

Imports `training`, `evaluation` and the layers below them.
"""
