"""Send a trained model or adapter to the hub, with a card that contains the results of its evaluations.

Imports `evaluation`, `training` and the layers below them.
"""
