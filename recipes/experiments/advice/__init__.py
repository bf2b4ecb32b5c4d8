"""Measure `apo advise` on targets and pairs whose best objective is known from training with every objective."""
