"""Log-probs of pairs in packed rows that share a prompt, exact, and the padded form beside them.

Imports no other folder of the package.
"""
