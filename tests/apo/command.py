"""The command `apo` in this process."""

from __future__ import annotations

import pytest

from apo import cli


def call(monkeypatch, *arguments):
    """Run `apo` with these arguments. Returns its exit code."""
    monkeypatch.setattr("sys.argv", ["apo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code
