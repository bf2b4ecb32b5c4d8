"""Filters with a promise: conformal calibration, and certified properties of a score.

Imports `data` and `models`.
"""
