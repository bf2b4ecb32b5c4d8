"""Whether a model is better, and how sure that is: held-out pairs, MixEval-Hard, win rates, comparisons.

Imports `data` and `models`.
"""
