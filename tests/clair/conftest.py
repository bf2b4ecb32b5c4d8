"""Servers that a test asks for by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clair.building import ScriptedServer, scripted


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A scripted server of the test's own."""
    with scripted() as running:
        yield running
