"""Rounds of build, train and evaluate. Each round starts from the model of the previous one.

May import `pipeline` and what is below it. `apo` runs as a command: nothing here imports it.
"""
