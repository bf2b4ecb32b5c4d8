"""The foundations of the package: errors, recipes, files, URLs, statistics, progress, exit codes.

Imports no other folder of the package.
"""
