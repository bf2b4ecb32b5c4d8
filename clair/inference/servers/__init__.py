"""Servers of models that a run starts, waits for and ends. May import the modules of `clair.inference` but `open` and
`client`."""
