"""A dataset handed on: rows for others, the hub (a stand-in of it), a further round."""

from __future__ import annotations

import base64
import json
import urllib.request

import pytest
import yaml

from clair.core.errors import UserError
from clair.core.recipe import load_recipe, resolve
from clair.data.dataset import read_rows
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from clair.pipeline.export import export, files_to_push, next_round, push
from recipes.world.running import running_module
from tests.clair.building import finished, start_clair
from tests.clair.scripted import Scripted, endpoint, install, recipe, revision


@pytest.fixture
def folder(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    answers = ["a bad answer"] * 4 + ["a fine answer"] * 2 + ["another bad one"] * 3
    rows = [{"id": f"r{i}", "prompt": f"question {i}", "answer": text} for i, text in enumerate(answers)]
    config = recipe(tmp_path / "round-1", rows, pipeline="revised", reviser=endpoint(), limit=6, test_fraction=0)
    build(config)
    return tmp_path / "round-1"


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_rows_for_other_trainers_by_form(folder, tmp_path):
    assert export("preference", folder, "train", tmp_path / "p.jsonl") == 4
    assert lines(tmp_path / "p.jsonl")[0] == {
        "id": "r0",
        "prompt": [{"role": "user", "content": "question 0"}],
        "chosen": [{"role": "assistant", "content": "a good answer"}],
        "rejected": [{"role": "assistant", "content": "a bad answer"}],
    }
    assert export("unpaired", folder, "train", tmp_path / "u.jsonl") == 8
    assert [row["label"] for row in lines(tmp_path / "u.jsonl")] == [True, False] * 4
    export("text", folder, "train", tmp_path / "t.jsonl")
    assert lines(tmp_path / "t.jsonl")[0] == {
        "id": "r0", "prompt": "question 0", "chosen": "a good answer", "rejected": "a bad answer",
    }  # fmt: skip


def test_a_push_would_send_the_pairs_and_their_papers_but_never_the_ledger(folder):
    names = [file.name for file in files_to_push(folder)]
    assert names == ["README.md", "manifest.json", "dropped.jsonl", "test-00000-of-00001.parquet",
                     "train-00000-of-00001.parquet"]  # fmt: skip
    assert (folder / "ledger.sqlite").exists()


@pytest.fixture(scope="module")
def hub():
    with running_module("tests.clair.hub_server", []) as server:
        yield server.url.removesuffix("/v1")


def pushed(hub):
    with urllib.request.urlopen(f"{hub}/pushed", timeout=30) as response:
        return json.load(response)


def clair_push(hub, folder, name, *options, token="right-token"):
    """`clair push` as a user runs it, but that the hub is the stand-in; Xet, which has its own protocol, is off."""
    online = {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return finished(start_clair("push", folder, name, *options, environment=online))


def test_a_push_sends_just_what_it_showed_byte_for_byte(folder, hub):
    requests = len(pushed(hub)["seen"])
    shown = clair_push(hub, folder, "org/pairs")
    assert shown.code == 0, shown
    assert "nothing was sent; add --yes to send these 5 files to org/pairs (private)" in shown.out
    assert pushed(hub)["seen"][requests:] == ["GET /pushed"]  # and there was no other request
    sent = clair_push(hub, folder, "org/pairs", "--yes")
    assert sent.code == 0, sent
    assert f"{hub}/datasets/org/pairs" in sent.out
    repository = pushed(hub)["repositories"]["org/pairs"]
    assert (repository["visibility"], repository["type"]) == ("private", "dataset")
    contents = {path: base64.b64decode(content) for path, content in repository["files"].items()}
    assert contents == {str(f.relative_to(folder)): f.read_bytes() for f in files_to_push(folder)}
    assert all(f"{path}  {len(content):,} bytes" in shown.out for path, content in contents.items())
    again = clair_push(hub, folder, "org/pairs", "--yes")
    assert again.code == 0, again


def test_private_pairs_are_not_sent_to_a_public_dataset(folder, hub):
    assert clair_push(hub, folder, "org/public", "--yes", "--public").code == 0
    (folder / "README.md").write_text((folder / "README.md").read_text() + "secret")
    result = clair_push(hub, folder, "org/public", "--yes")
    assert result.code == 2
    assert "error: org/public exists already and is public" in result.err
    assert b"secret" not in base64.b64decode(pushed(hub)["repositories"]["org/public"]["files"]["README.md"])


def test_a_push_with_a_wrong_token_is_one_line_without_the_token(folder, hub):
    result = clair_push(hub, folder, "org/other", "--yes", token="hf_plantedtoken")
    assert result.code == 2
    assert "error: cannot push to org/other: " in result.err
    assert "401" in result.err
    assert "hf_plantedtoken" not in result.out + result.err
    assert "org/other" not in pushed(hub)["repositories"]


def test_a_push_without_a_token_is_one_line_before_any_request(folder, hub):
    requests = len(pushed(hub)["seen"])
    result = clair_push(hub, folder, "org/other", "--yes", token="")
    assert result.code == 2
    assert result.err.endswith("there is no token of the hub; run `hf auth login`, or set HF_TOKEN\n")
    assert pushed(hub)["seen"][requests:] == ["GET /pushed"]


def test_a_push_to_an_invalid_name_is_one_line(folder, hub):
    result = clair_push(hub, folder, "org/na me", "--yes")
    assert result.code == 2
    assert "error: cannot push to org/na me: " in result.err


def test_a_push_that_cannot_be_made_is_one_line(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "any")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot push to org/name"):
        push(folder, "org/name", private=True)


def test_a_further_round_asks_the_tuned_model_what_it_got_wrong_and_what_it_has_not_seen(folder, tmp_path):
    recipe, again, unseen = next_round(folder, "runs/tuned", tmp_path / "round-2")
    assert (again, unseen) == (4, 3)
    config = load_recipe(BuildConfig, recipe)
    assert config.target.path == "runs/tuned"
    assert config.reviser.model == "scripted"
    assert config.limit is None
    rows = lines(tmp_path / "round-2-prompts.jsonl")
    assert [row["id"] for row in rows] == ["r0", "r1", "r2", "r3", "r6", "r7", "r8"]
    assert not any("answer" in row for row in rows)
    with pytest.raises(UserError, match="exists already"):
        next_round(folder, "runs/tuned", tmp_path / "round-2")


def test_a_further_round_keeps_the_labels_of_its_prompts_and_no_source_that_a_prompt_did_not_have(
    tmp_path, monkeypatch
):
    install(monkeypatch, reviser=Scripted("reviser", revision), target=Scripted("target", lambda m, n: "a bad answer"))
    labels = [{"annotator": 7, "group": "brief", "behaviour": "tone"}, {"source": "forum"}, {}, {"annotator": "u"}]
    rows = [{"id": f"r{n}", "prompt": f"question {n}", "answer": "bad", **more} for n, more in enumerate(labels)]
    prompts = {"path": str(tmp_path / "round-1-prompts.jsonl"), "columns": {"user": "annotator"}}
    config = recipe(tmp_path / "round-1", rows, pipeline="revised", reviser=endpoint(), limit=3, prompts=prompts)
    build(config)
    next_recipe, *_ = next_round(tmp_path / "round-1", "runs/tuned", tmp_path / "round-2")
    build(resolve(BuildConfig, yaml.safe_load(next_recipe.read_text("utf-8")) | {"target": endpoint()}))
    kept = {row["id"]: [row[name] for name in ("user", "group", "behaviour", "source")]
            for row in read_rows(tmp_path / "round-2")}  # fmt: skip
    assert kept == {
        "r0": ["7", "brief", "tone", "revised"],
        "r1": [None, None, None, "forum"],
        "r2": [None, None, None, "revised"],
        "r3": ["u", None, None, "revised"],
    }
    assert ["source" in row for row in lines(tmp_path / "round-2-prompts.jsonl")].count(True) == 1


def test_a_further_round_keeps_the_stronger_models_answers_which_it_prefers_again(tmp_path, monkeypatch):
    install(monkeypatch, target=Scripted("target", lambda m, n: "a bad answer"))
    rows = [{"id": f"r{n}", "prompt": f"question {n}", "answer": "bad", "gold": f"good {n}"} for n in range(3)]
    prompts = {"path": str(tmp_path / "round-1-prompts.jsonl"), "columns": {"stronger": "gold"}}
    build(recipe(tmp_path / "round-1", rows, pipeline="stronger", limit=2, prompts=prompts))
    next_recipe, *_ = next_round(tmp_path / "round-1", "runs/tuned", tmp_path / "round-2")
    build(resolve(BuildConfig, yaml.safe_load(next_recipe.read_text("utf-8")) | {"target": endpoint()}))
    chosen = {row["id"]: row["chosen"][0]["content"] for row in read_rows(tmp_path / "round-2")}
    assert chosen == {"r0": "good 0", "r1": "good 1", "r2": "good 2"}
