"""Filters with a statistical guarantee: conformal calibration, and certified properties of a score.

Imports `data` and `models`.
"""
