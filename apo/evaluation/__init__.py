"""Measuring a model with intervals: held-out pairs, MixEval-Hard, win rates, comparisons of results.

Imports `data` and `models`.
"""
