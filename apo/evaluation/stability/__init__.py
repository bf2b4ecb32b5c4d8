"""Measure how stable a judge is: judge the same answers several times, and by a second judge.

Imports `mixeval` and `evaluation`.
"""
