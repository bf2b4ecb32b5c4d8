"""`apo advise`: evidence with intervals, and a rule that was fixed before its advice was measured.

Imports `evaluation` and `training`.
"""
