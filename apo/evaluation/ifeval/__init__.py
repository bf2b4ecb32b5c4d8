"""The benchmark IFEval: prompts with verifiable instructions, a kept library's checkers, and scores with intervals.

Imports `evaluation`.
"""
