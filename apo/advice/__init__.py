"""`apo advise`: evidence with intervals, and a rule that was fixed before it was measured.

Imports `evaluation` and `training`.
"""
