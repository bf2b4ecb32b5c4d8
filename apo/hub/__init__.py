"""Send a trained model or adapter to the hub, with a card that holds the evidence.

Imports `evaluation`, `training` and the layers below them.
"""
