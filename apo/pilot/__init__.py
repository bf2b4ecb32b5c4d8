"""`apo advise --pilot`: short training runs at matched rates, chosen among by the user's own metric.

Imports `advice`, `sweep`, `training`, `evaluation` and the layers below them.
"""
