"""Records and the files that hold them: prompts in, preference pairs out, contrast and duplicates measured.

Imports `core` and `storage`.
"""
