"""Run the embedded endpoint from Python, as a subprocess with a time limit that is stopped by its process id."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from recipes.world.server import ServerOptions

ROOT = Path(__file__).parents[2]


@contextmanager
def ending_in_one_line(name: str, again: str = "run the same command to continue") -> Iterator[None]:
    """Exit with one line at a UserError or at Ctrl-C, as the command `name`; `again` says how to go on."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; {again}", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass(frozen=True)
class Running:
    """A server that answers at `url` (which ends in /v1)."""

    url: str
    pid: int

    def stats(self) -> dict[str, Any]:
        """The response of GET /stats; see `RequestCounts.as_json`."""
        address = self.url.removesuffix("/v1") + "/stats"
        with urllib.request.urlopen(address, timeout=10) as response:  # noqa: S310 - our own loopback server
            return json.load(response)


def arguments(options: ServerOptions) -> list[str]:
    """The command-line arguments that give a server these options."""
    named = {f.name: getattr(options, f.name) for f in fields(ServerOptions)}
    for group in (named.pop("misbehaviour"), named.pop("leanings")):
        named |= {f.name: getattr(group, f.name) for f in fields(group)}
    result = []
    for name, value in named.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            result += [option] * value
        elif value is not None:
            result.append(f"{option}={value}")
    return result


@contextmanager
def running(options: ServerOptions = ServerOptions(), *, start_seconds: float = 120.0) -> Iterator[Running]:  # noqa: B008
    """The world's server for the length of a `with` block. Raises RuntimeError after `start_seconds` without a URL."""
    with running_module("recipes.world.server", arguments(options), start_seconds) as server:
        yield server


@contextmanager
def running_module(module: str, arguments: Sequence[str], start_seconds: float = 120.0) -> Iterator[Running]:
    """A module that serves and prints its URL, as a process for the length of a `with` block.

    Raises RuntimeError after `start_seconds` without a URL.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield Running(_ready_line(process, start_seconds), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
        assert process.stdout is not None
        process.stdout.close()


def _ready_line(process: subprocess.Popen[str], seconds: float) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline().strip() if selector.select(seconds) else ""
    if not line.startswith("http"):
        raise RuntimeError(f"the server did not start within {seconds:g} s (exit code {process.poll()})")
    return line
