"""The benchmark MixEval-Hard: its questions, answers to them, judging, and scores with intervals.

Imports `evaluation`.
"""
