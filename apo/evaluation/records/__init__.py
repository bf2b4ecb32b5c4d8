"""What the files of a result folder hold: items and scores, for each benchmark.

Imports nothing of apo.
"""
