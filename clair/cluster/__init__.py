"""A build on several processes or machines: shards, workers, shared limits, and the merge of what they made.

Imports `pipeline` and all that it imports.
"""
