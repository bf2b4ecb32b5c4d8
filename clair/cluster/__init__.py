"""A build on several processes or machines: workers, the limits they share, and the merge of their shards.

Imports `pipeline` and all that it imports.
"""
