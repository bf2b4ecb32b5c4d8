"""MixEval-Hard: questions, answers, judging, scores with intervals.

Imports `evaluation`.
"""
