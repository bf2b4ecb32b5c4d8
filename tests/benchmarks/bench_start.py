"""How long until something happens: importing the packages, and --help of the commands. Seconds, best of ten."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
TRIES = 10


def measure() -> dict[str, Any]:
    """Seconds for each, best of TRIES, interpreter start included."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import clair": [sys.executable, "-c", "import clair"],
        "import apo": [sys.executable, "-c", "import apo"],
        "clair --help": [BIN / "clair", "--help"],
        "apo --help": [BIN / "apo", "--help"],
    }
    return {
        "seconds": {name: round(min(_seconds(command) for _ in range(TRIES)), 3) for name, command in commands.items()}
    }


def _seconds(command: list[Any]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start
