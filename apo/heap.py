"""The heap of a process that trains on a CPU: glibc's settings that let it use freed memory again.

torch asks for blocks that begin at a multiple of 64 bytes. glibc cuts each out of a larger block and keeps the pieces
beside it, of less than 128 bytes, for small requests. So a freed block seldom joins its neighbours, and is too small
for the next request of its own size. Blocks above 32 MB go back to the system, which clears them again for each pass.
`TUNABLES` end both. glibc reads them only when a process starts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "tcache_count": 0,  # small pieces are kept neither per thread
        "mxfast": 0,  # nor in lists by size: they join their neighbours at once
        "mmap_max": 0,  # large blocks are of the heap too,
        "trim_threshold": 2**40,  # which keeps what is freed
        "top_pad": 2**26,
    }.items()
)
"""Settings of `malloc`, https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html"""
_VARIABLE = "GLIBC_TUNABLES"
_GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""Devices of NVIDIA's and AMD's drivers: beside a GPU the host's heap is small."""


def restart_with_tunables() -> None:
    """Replace this process by the same command under `TUNABLES`, which its children inherit.

    Nothing happens with another C library, beside a GPU, and if the environment already configures an allocator.
    """
    configured = any(name == _VARIABLE or name.startswith(("MALLOC_", "LD_PRELOAD")) for name in os.environ)
    if not configured and _has_glibc() and not any(Path(device).exists() for device in _GPUS):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, _VARIABLE: TUNABLES})  # noqa: S606


def reuses_memory() -> bool:
    """True if this process runs under `TUNABLES`."""
    return os.environ.get(_VARIABLE) == TUNABLES


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):  # Windows, another C library
        return False
