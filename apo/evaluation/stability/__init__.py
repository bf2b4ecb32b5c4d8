"""How stable a judge is: the same answers judged several times, and by another judge.

Imports `mixeval` and `evaluation`.
"""
