"""Rounds of build, train and evaluate, each on the model of the round before.

May import `pipeline` and what is below it. `apo` runs as a command: nothing here imports it.
"""
