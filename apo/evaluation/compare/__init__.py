"""Two or more results compared question by question, as tables and as a page.

Imports `evaluation`.
"""
