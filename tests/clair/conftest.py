"""Fixtures of servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clair.building import ScriptedServer, scripted


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[ScriptedServer]:
    with scripted() as running:
        yield running


@pytest.fixture
def server(scripted_server: ScriptedServer) -> ScriptedServer:
    """The scripted server, knowing of nothing."""
    scripted_server.forget()
    return scripted_server
