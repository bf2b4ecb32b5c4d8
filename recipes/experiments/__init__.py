"""Code that makes the results in docs: the paper in small, advice, tastes, plans for real models."""
