"""`apo push` to a stand-in of the hub, a process of its own: the model and its evidence, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from apo.hub.push import files_to_push
from apo.training.config import TrainConfig
from apo.training.train import train
from clair.core.errors import UserError
from clair.inference.model_folder import weights_identity
from recipes.world.running import running_module
from tests.apo.conftest import TRAINER, make_model, make_pairs, make_tokenizer, write_jsonl
from tests.apo.evaluation.evaluating import apo

TOKEN = "hf_plantedtoken1234567890"


@pytest.fixture(scope="module")
def hub():
    with running_module("tests.clair.hub_server", []) as server:
        yield server.url.removesuffix("/v1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run with a checkpoint, an adapter's run beside it, and files that must not leave the machine."""
    root = tmp_path_factory.mktemp("push")
    make_model().save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    pairs = write_jsonl(root / "pairs.jsonl", make_pairs(16))
    trainer = {**TRAINER, "max_steps": 4, "save_steps": 2, "report_to": "none", "hub_token": TOKEN}
    keys = {"model": str(root / "model"), "dataset": str(pairs), "probe": 0, "samples": 0}
    for name, more in (("run", {}), ("adapter", {"lora": {"r": 2}})):
        train(TrainConfig(**keys, **more, trainer=trainer, out=str(root / name)), log=lambda _: None)
    (root / "run/ledger.sqlite").write_bytes(b"paid replies")
    (root / "run/notes.json").write_text('{"password": "x"}')
    (root / "run/optimizer.safetensors").write_bytes(b"state")
    return root


def pushed(hub: str) -> dict:
    with urllib.request.urlopen(f"{hub}/pushed", timeout=30) as response:
        return json.load(response)


def apo_push(hub: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`apo push` as a user runs it, but that the hub is the stand-in; Xet, which has its own protocol, is off."""
    online = {"HF_ENDPOINT": hub, "HF_TOKEN": "right-token", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "apo.cli", "push", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **online}, capture_output=True, text=True, timeout=900)


def pushed_files(run: Path, **changes) -> dict[str, bytes]:
    """What a push would send, by path."""
    files = files_to_push(run, "org/name", **{"checkpoint": None, "base": None, "evidence": [], **changes})
    return {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in files.items()}


def write_pairs_result(folder: Path, model: Path) -> Path:
    folder.mkdir()
    accuracy = {"mean": 0.875, "ci95": [0.7, 0.95]}
    result = {"settings": {"model": str(model)}, "reward_accuracy": accuracy, "pairs": 16}
    (folder / "pairs.json").write_text(json.dumps(result))
    return folder


def write_winrate(folder: Path, identity: str) -> Path:
    folder.mkdir()
    models = {role: {"name": role, "identity": "weights:0"} for role in ("base", "judge")}
    rate = {"win_rate": {"mean": 0.6, "ci95": [0.5, 0.7]}, "comparisons": 40}
    (folder / "winrate.json").write_text(json.dumps({**models, **rate, "tuned": {"name": "run", "identity": identity}}))
    return folder


def test_a_push_sends_the_model_and_its_evidence_privately_and_nothing_else(hub, trained, tmp_path):
    run = trained / "run"
    evidence = write_pairs_result(tmp_path / "pairs", run), write_winrate(tmp_path / "rate", weights_identity(run))
    arguments = [run, "org/tuned", "--evidence", evidence[0], "--evidence", evidence[1]]
    requests = len(pushed(hub)["seen"])
    shown = apo(*("push", *arguments))
    assert shown.code == 0, shown
    assert re.search(r"nothing was sent; add --yes to send these \d+ files to org/tuned \(private\)", shown.out)
    assert pushed(hub)["seen"][requests:] == ["GET /pushed"]
    sent = apo_push(hub, *arguments, "--yes")
    assert sent.returncode == 0, sent.stderr
    repository = pushed(hub)["repositories"]["org/tuned"]
    assert (repository["visibility"], repository["type"]) == ("private", "model")
    files = {path: base64.b64decode(content) for path, content in repository["files"].items()}
    expected = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "run.json", "metrics.jsonl"}
    assert expected <= set(files)
    allowed = r"README.md|run.json|metrics.jsonl|dynamics.png|model.safetensors|chat_template.jinja|.*config.json|"
    assert all(re.fullmatch(allowed + "tokenizer.json|special_tokens_map.json", name) for name in files), sorted(files)
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert all(f"{path}  {len(content):,} bytes" in shown.out for path, content in files.items())
    private = TOKEN, str(trained / "model")
    assert not [path for path, content in files.items() if any(text.encode() in content for text in private)]
    card = files["README.md"].decode()
    assert "| held-out reward accuracy | 87.5 | 70.0 to 95.0 | 16 pairs |" in card
    assert "| win rate against base | 60.0 | 50.0 to 70.0 | judge judge, 40 comparisons |" in card
    assert 'from_pretrained("org/tuned")' in card
    assert "base_model" not in card  # a folder of this machine
    assert json.loads(files["run.json"])["recipe"]["model"] == "model"


def test_a_checkpoint_is_pushed_with_the_metrics_of_its_step(trained):
    files = pushed_files(trained / "run", checkpoint=2, base="org/base")
    assert files["model.safetensors"] == (trained / "run/checkpoint-2/model.safetensors").read_bytes()
    assert not [name for name in files if name.endswith((".pt", ".pth")) or "state" in name or "complete" in name]
    card = files["README.md"].decode()
    assert "base_model: org/base\n" in card
    assert "for 2 steps" in card
    assert max(json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()) == 2


def test_an_adapter_names_its_base_on_the_hub(trained):
    assert "is a folder of this machine" in problem(trained / "adapter")
    files = pushed_files(trained / "adapter", base="org/base")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert {"adapter_model.safetensors", "README.md"} <= set(files)
    assert "model.safetensors" not in files


@pytest.mark.parametrize("public", [False, True])
def test_a_model_is_private_unless_it_is_to_be_public(monkeypatch, trained, public):
    sent: dict = {}
    monkeypatch.setattr("clair.storage.hub.push_files", lambda files, name, **more: sent.update(more) or "url")
    assert apo("push", trained / "run", "org/name", "--yes", *(["--public"] if public else [])).code == 0
    assert sent == {"kind": "model", "private": not public, "message": "Trained with clair-apo"}


def problem(run: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        files_to_push(run, "org/name", **{"checkpoint": None, "base": None, "evidence": [], **changes})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_pushed_is_refused_in_one_line(trained, tmp_path):
    run = trained / "run"
    assert "holds no run of `apo train`" in problem(tmp_path)
    assert "has no checkpoint of step 3; it has: 2, 4" in problem(run, checkpoint=3)
    assert "holds no result" in problem(run, evidence=[tmp_path])
    other = write_winrate(tmp_path / "other", "weights:1")
    assert "is of another model, run" in problem(run, evidence=[other])
    pairs = write_pairs_result(tmp_path / "pairs", trained / "adapter")
    assert "is of another model" in problem(run, evidence=[pairs])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    content = json.loads((run / "run.json").read_text())
    del content["finished"]
    (unfinished / "run.json").write_text(json.dumps(content))
    assert "is not finished" in problem(unfinished)


def test_a_damaged_checkpoint_is_not_pushed(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    with open(tmp_path / "run/checkpoint-2/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert "model.safetensors is damaged" in problem(tmp_path / "run", checkpoint=2)
