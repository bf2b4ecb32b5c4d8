"""Comparison of evaluation results, question by question, as tables and as a page.

Imports `evaluation`.
"""
