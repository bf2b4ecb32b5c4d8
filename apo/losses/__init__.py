"""Preference objectives as pure, unreduced functions of log-ratios; their mixtures, and when they saturate.

Imports `clair.core`.
"""
