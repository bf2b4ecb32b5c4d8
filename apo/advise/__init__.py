"""Which objective these pairs and this model ask for: evidence with intervals, and a rule that was fixed beforehand."""
