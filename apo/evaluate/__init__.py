"""Whether a model is better, and how sure that is: MixEval-Hard, comparisons, win rates, held-out pairs."""
