"""Settings of every test: no hub, no telemetry, and the folder of shared reference data if there is one."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports a hub client: no test requests anything from a hub, or reads another run's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.environ["CLAIR_CACHE"] = _CACHE = tempfile.mkdtemp(prefix="clair-apo-tests-")
os.environ.pop("HF_DATASETS_CACHE", None)
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

# A busy machine is no failure. In CI the examples are the same every time; elsewhere each run draws new ones.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("house")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Leave the objects of all imports out of later garbage collections.

    Every training run ends with one, and statsmodels runs one in each call; each would take a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quick_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of progress comes into what a test reads because the machine is slow; tests of progress enable it."""
    monkeypatch.setattr("clair.core.progress.FIRST_LINE_AFTER", 3600.0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder named by CLAIR_SHARED, default ../shared beside the repository. Skips where it is absent."""
    named = os.environ.get("CLAIR_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(
            f"no real input in {named or '../shared'}: recorded GPT-4 revisions, MixEval-Hard with a model's answers, "
            "IFEval with GPT-4's; docs/contributing.md says what these tests show and where the data is to be had"
        )
    return folder


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A folder with SmolLM2-135M-Instruct, named by CLAIR_REAL_MODEL, default ~/.cache/clair-apo/smollm2-135m.

    Skips where it is absent.
    """
    named = os.environ.get("CLAIR_REAL_MODEL")
    folder = Path(named) if named else Path.home() / ".cache" / "clair-apo" / "smollm2-135m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(
            f"no real model in {named or '~/.cache/clair-apo/smollm2-135m'}: SmolLM2-135M-Instruct; "
            "docs/contributing.md says what these tests show and where it is to be had"
        )
    return folder
