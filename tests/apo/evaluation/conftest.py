"""The small benchmark, and the real one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apo.evaluation.evaluating import JudgeServer, judging
from tests.apo.evaluation.questions import accept, write_data


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A data folder of invented questions, with their hashes as the published ones."""
    folder = write_data(tmp_path / "data")
    accept(monkeypatch, folder)
    return folder


@pytest.fixture(scope="session")
def real(shared) -> Path:
    """The real benchmark. Skips where it is not."""
    folder = shared / "data" / "mixeval"
    if not folder.is_dir():
        pytest.skip("no MixEval data among the shared reference data")
    return folder


@pytest.fixture(scope="session")
def judge_server() -> Iterator[JudgeServer]:
    with judging() as running:
        yield running


@pytest.fixture
def server(judge_server: JudgeServer) -> JudgeServer:
    """The judge's server, knowing of nothing."""
    judge_server.forget()
    return judge_server
