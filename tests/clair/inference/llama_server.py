"""llama.cpp's server of a GGUF file, from xllamacpp's wheel, which needs no compiler.

python -m tests.clair.inference.llama_server MODEL.gguf PORT
"""

from __future__ import annotations

import sys
import threading

SLOTS, CONTEXT = 4, 2048
"""Requests at once, and the tokens of each with its answer."""


def main() -> None:
    """Serve until the process is ended."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.port = sys.argv[1], int(sys.argv[2])
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * CONTEXT
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
