"""Recipes for models of 1 to 8 billion parameters, and what they will cost, planned without a weight."""
