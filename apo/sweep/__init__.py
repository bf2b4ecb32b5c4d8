"""A grid of training recipes: one run for each combination, and the best of them, corrected for its selection.

Imports `training`, `evaluation` and the layers below them.
"""
