"""`apo train`: the recipe, the checks before the first step, the trainer on TRL, and a whole run.

Imports every folder above except the analyses.
"""
