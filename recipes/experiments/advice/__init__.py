"""`apo advise` measured: targets and pairs whose best objective is known by training with all of them."""
