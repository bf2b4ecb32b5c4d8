"""Log-probs of pairs: exact in packed rows that share prompts, and in TRL's padded batch.

Imports `data`.
"""
