"""The user's mistakes: one line on stderr, exit code 2, nothing spent, and what was made stays as it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.world.running import Running, running
from recipes.world.server import ServerOptions
from tests.clair.building import (
    ScriptedServer,
    clair,
    error_line,
    manifest,
    pairs,
    recipe_for,
    scripted_rows,
    write_prompts,
    write_recipe,
)


@dataclass
class Workspace:
    """A finished dataset in out/, made from prompts.jsonl on a server, and the recipe it was made with."""

    path: Path
    url: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.path / "out"

    def recipe(self, **changes: Any) -> Path:
        """The recipe with changes; to None leaves a key out."""
        return write_recipe(self.path, self.url, **self.values | changes)

    def snapshot(self) -> dict[str, str]:
        """The hash of every file in out/ that a run may not touch when it fails."""
        return {
            str(file.relative_to(self.out)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(self.out.rglob("*"))
            if file.is_file() and file.name != ".lock"
        }


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory, scripted_server) -> Path:
    path = tmp_path_factory.mktemp("finished")
    write_prompts(path / "prompts.jsonl", scripted_rows(["ok"] * 3))
    assert clair("build", write_recipe(path, scripted_server.url)).code == 0
    return path


@pytest.fixture
def workspace(tmp_path, finished_once, server: ScriptedServer) -> Workspace:
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "out" / "recipe.json"
    values = json.loads(recipe.read_text())
    values["out"], values["prompts"]["path"] = str(tmp_path / "out"), str(tmp_path / "prompts.jsonl")
    recipe.write_text(json.dumps(values, indent=2) + "\n")
    return Workspace(tmp_path, server.url)


def refuse(workspace: Workspace, server: ScriptedServer, *arguments: str | Path, match: str) -> None:
    """Assert that the command fails with one line that matches, sends no request, and leaves out/ unchanged."""
    snapshot = workspace.snapshot()
    line = error_line(clair(*arguments))
    assert re.search(match, line), line
    assert server.requests() == []
    assert workspace.snapshot() == snapshot


# ---- the recipe

M = {"model": "m"}
WRONG_RECIPES: list[tuple[Mapping[str, Any], str]] = [
    # unknown or misspelt keys, with the near miss
    ({"promts": 1}, r"unknown key 'promts' \(did you mean 'prompts'\?\); allowed: accept, attempts"),
    ({"reviser": {**M, "temprature": 1}}, r"unknown key 'reviser.temprature' \(did you mean 'temperature'\?\)"),
    ({"target": {**M, "templates": 1}}, r"unknown key 'target.templates'"),
    ({"prompts": {"path": "p.jsonl", "colums": {}}}, r"'prompts.colums' \(did you mean 'columns'\?\)"),
    ({"budget": {"mony": 1}}, r"'budget.mony' \(did you mean 'money'\?\)"),
    ({"reviser": {**M, "price": {"input": 1, "ouput": 2}}}, r"'reviser.price.ouput' \(did you mean 'output'\?\)"),
    ({"filters": {"alusion": False}}, r"unknown filter 'alusion' \(did you mean 'allusion'\?\)"),
    ({"filters": {"length": {"mots": 1}}}, r"unknown option 'mots' \(did you mean 'most'\?\)"),
    # missing and wrong values
    ({"reviser": None}, "the pipeline 'revised' needs reviser"),
    ({"pipeline": None}, "the key 'pipeline' is missing"),
    ({"prompts": None}, "the key 'prompts' is missing"),
    ({"out": None}, "the key 'out' is missing"),
    ({"out": ""}, "out: String should have at least 1 character"),
    ({"pipeline": "revise"}, "pipeline: Input should be 'revised', 'judged', 'stronger' or 'delta', found 'revise'"),
    ({"judge": {**M, "url": "http://x"}}, "judge is not used by the pipeline 'revised'; remove it"),
    ({"concurrency": 0}, "concurrency: .*greater than or equal to 1, found 0"),
    ({"attempts": 0}, "attempts: .*greater than or equal to 1, found 0"),
    ({"limit": 0}, "limit: .*greater than or equal to 1"),
    ({"accept": 0}, "accept: .*greater than or equal to 1"),
    ({"test_fraction": 1}, "test_fraction: .*less than 1"),
    ({"seed": "x"}, "seed: .*valid integer"),
    ({"filters": {"allusion": "maybe"}}, "filters.allusion"),
    ({"prompts": "p.jsonl"}, "prompts: .*found 'p.jsonl'"),
    ({"reviser": {**M, "temperature": -1}}, "reviser.temperature: .*greater than or equal to 0"),
    ({"reviser": {**M, "max_tokens": 0}}, "reviser.max_tokens: .*greater than or equal to 1"),
    ({"reviser": {**M, "timeout": 0}}, "reviser.timeout: .*greater than 0"),
    ({"reviser": {**M, "mode": "edit"}}, "reviser.mode: Input should be 'rewrite' or 'edits', found 'edit'"),
    # a model is an endpoint or a folder
    ({"reviser": {"url": None, **M}}, "reviser: give either url and model .* or path"),
    ({"reviser": {"path": "x", **M}}, "reviser: give either url and model .* or path"),
    ({"reviser": {"model": None}}, "reviser: an endpoint needs model"),
    ({"reviser": {**M, "url": "127.0.0.1:8000/v1"}}, "reviser: url '127.0.0.1:8000/v1' is no http"),
    ({"reviser": {**M, "url": "ftp://h/v1"}}, "reviser: url 'ftp://h/v1' is no http"),
    ({"reviser": {**M, "url": "http:///v1"}}, "reviser: url 'http:///v1' has no host"),
    ({"reviser": {**M, "url": "http://h:99999/v1"}}, "reviser: Port out of range 0-65535"),
    ({"reviser": {**M, "url": "http://h:x/v1"}}, "reviser: Port could not be cast"),
    ({"reviser": {**M, "url": "http://[/v1"}}, "reviser: Invalid IPv6 URL"),
    ({"reviser": {**M, "url": ["http://h/v1", "h"]}}, "reviser: url 'h' is no http"),
    ({"reviser": {**M, "url": "http://u:p@h/v1", "api_key_env": "HOME"}}, "a request carries only one"),
    ({"reviser": {**M, "url": 7}}, "reviser.url: Input should be a valid string, found 7"),
    ({"target": {**M, "url": []}}, "target: url is an empty list; give a base URL, or a list of at least one"),
    (
        {"reviser": {**M, "extra": {"max_completion_tokens": "abc"}}},
        "reviser: extra.max_completion_tokens is 'abc', not a whole number of at least 1 or null",
    ),
    ({"reviser": {**M, "extra": {"max_completion_tokens": 0}}}, "reviser: extra.max_completion_tokens is 0, not a"),
    ({"reviser": {**M, "extra": {"max_tokens": [7]}}}, r"reviser: extra.max_tokens is \[7\], not a whole number"),
    ({"reviser": {**M, "extra": {"max_tokens": True}}}, "reviser: extra.max_tokens is True, not a whole number"),
    ({"reviser": {**M, "extra": {"headers": ["a"]}}}, "reviser: extra.headers is no mapping"),
    ({"reviser": {**M, "extra": {"headers": {"X-A": 7}}}}, "extra.headers.X-A is int, not text"),
    ({"reviser": {**M, "extra": {"headers": {"X-A": "a\nb"}}}}, "extra.headers.X-A holds characters that no header"),
    ({"reviser": {**M, "extra": {"headers": {"X-A": "é"}}}}, "extra.headers.X-A holds characters that no header"),
    ({"reviser": {**M, "extra": {"messages": []}}}, "reviser: extra.messages would break the request"),
    ({"reviser": {**M, "extra": {"n": 2}}}, "reviser: extra.n would break the request"),
    ({"reviser": {**M, "extra": {"top_p": float("nan")}}}, "reviser: extra.top_p holds NaN, infinity or half"),
    ({"reviser": {**M, "extra": {"a": {"b": "\ud83d"}}}}, "reviser: extra.a holds .* which no request can"),
    ({"reviser": {**M, "extra": {"headers": {"X-A\n": "a"}}}}, r"extra.headers has the name 'X-A.n'; allowed are"),
    ({"reviser": {**M, "extra": {"stream": True}}}, "reviser: extra.stream would break the request"),
    # secrets
    ({"reviser": {**M, "api_key_env": "NO_SUCH_KEY"}}, "reviser needs the environment variable NO_SUCH_KEY"),
    ({"reviser": {**M, "extra": {"headers": {"Authorization": "Bearer x"}}}}, "looks like a secret written into"),
    ({"reviser": {**M, "extra": {"headers": {"X-Team": "${NO_SUCH}"}}}}, "needs the environment variable NO_SUCH"),
    ({"reviser": {**M, "api_key_env": "TWO_LINES"}}, "the key in the environment variable TWO_LINES is none"),
    # money
    ({"budget": {"money": 1}}, "a budget in money needs reviser.price"),
    ({"budget": {"money": 1, "tokens": 1}}, "budget: give either money or tokens"),
    ({"budget": {"tokens": 0}}, "budget.tokens: .*greater than 0"),
    ({"budget": {"tokens": 9}, "reviser": {**M, "max_tokens": None}}, "a budget needs reviser.max_tokens"),
    # models in folders
    ({"target": {"path": "no/such/model"}}, "target: model folder no/such/model does not exist"),
    # templates
    ({"reviser": {**M, "template": "no/such.j2"}}, "template no/such.j2 does not exist"),
]


@pytest.mark.parametrize(("changes", "match"), WRONG_RECIPES, ids=[str(c)[:60] for c, _ in WRONG_RECIPES])
def test_a_wrong_recipe(workspace, server, monkeypatch, changes, match):
    monkeypatch.setenv("TWO_LINES", "one\ntwo")
    reviser = changes.get("reviser")
    if isinstance(reviser, dict) and "url" not in reviser and "path" not in reviser:
        changes = {**changes, "reviser": {"url": server.url, **reviser}}
    if isinstance(reviser, dict) and "path" in reviser:
        changes = {**changes, "reviser": {"url": server.url, **reviser}}
    if isinstance(changes.get("target"), dict) and "path" not in changes["target"]:
        changes = {**changes, "target": {"url": server.url, **changes["target"]}}
    recipe = workspace.path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(workspace.path, workspace.url, **changes), sort_keys=False))
    refuse(workspace, server, "build", recipe, match=match)
    refuse(workspace, server, "build", recipe, "--dry-run", match=match)
    refuse(workspace, server, "estimate", recipe, match=match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "recipe .*recipe.yaml does not exist"),
        ("", "holds NoneType, not keys and values"),
        ("pipeline: [", "is not YAML"),
        ("pipeline: revised\npipeline: revised", "the key 'pipeline' stands twice"),
        ("- pipeline", "holds list"),
    ],
)
def test_a_file_that_is_no_recipe(workspace, server, text, match):
    recipe = workspace.path / "recipe.yaml"
    recipe.unlink()
    if text is not None:
        recipe.write_text(text)
    refuse(workspace, server, "build", recipe, match=match)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("concurrency", "--set takes key=value, got 'concurrency'"),
        ("concurency=3", r"unknown key 'concurency' \(did you mean 'concurrency'\?\)"),
        ("concurrency=many", "concurrency: .*found 'many'"),
        ("reviser.temperature=[", "--set reviser.temperature: the value is not YAML"),
    ],
)
def test_a_wrong_set(workspace, server, override, match):
    refuse(workspace, server, "build", workspace.recipe(), "--set", override, match=match)


@pytest.mark.parametrize("name", ["7", "1e3", "null", "true", "a: b", "[x", "'", "é 😀", "x=y"])
def test_any_name_will_do_for_a_folder(workspace, server, monkeypatch, name):
    monkeypatch.chdir(workspace.path)
    assert clair("build", workspace.recipe(), "--out", name).code == 0
    assert len(pairs(workspace.path / name)) == 3


# ---- the prompts


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("gone.jsonl", None, "prompt file .*gone.jsonl does not exist"),
        ("empty.jsonl", "", "prompt file .*empty.jsonl is empty"),
        ("blank.jsonl", "\n\n", "has no rows"),
        ("no.csv", "question,answer\na,b\n", "no column 'prompt'; columns found: question, answer; name yours under"),
        ("no.jsonl", '{"question": "a"}', "line 1: no column 'prompt'; columns found: question"),
        ("number.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": 7}', "line 2: the prompt is int, not text"),
        ("broken.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt', "line 2: not JSON"),
        ("mixed.jsonl", '{"prompt": "a", "answer": "b"}\n[1]', "line 2: list, not an object"),
        (
            "ids.jsonl",
            '{"id": 1, "prompt": "a", "answer": "b"}\n{"id": 1, "prompt": "c", "answer": "b"}',
            "the id '1' stands for two different prompts",
        ),
        (
            "bare.jsonl",
            '{"prompt": "a", "answer": "b"}\n{"prompt": "c"}',
            "1 of 2 prompts have no answer and the recipe has no target; add target: or an answer column",
        ),
        ("kind.txt", "hello", "is of no kind that is read"),
        ("no/such-data", None, "no such file, and load_dataset says"),
    ],
)
def test_wrong_prompts(workspace, server, name, content, match):
    path = workspace.path / name
    if content is not None:
        path.write_text(content)
    refuse(workspace, server, "build", workspace.recipe(prompts={"path": str(path)}), "--update", match=match)


def test_a_column_of_the_recipe_that_no_prompt_has(workspace, server):
    write_prompts(path := workspace.path / "p.jsonl", [{"prompt": "a", "response": "b"}])
    prompts = {"path": str(path), "columns": {"answer": "respnse"}}
    recipe = workspace.recipe(prompts=prompts, target={"url": server.url, "model": "m"})
    refuse(workspace, server, "build", recipe, "--update", match=r"no column 'respnse' \(did you mean 'response'\?\)")


def test_duplicate_prompts_are_no_mistake_but_counted(workspace, server):
    rows = scripted_rows(["ok"] * 3)
    write_prompts(workspace.path / "prompts.jsonl", [*rows, {**rows[0], "id": "again"}])
    result = clair("build", workspace.recipe())
    assert result.code == 0
    assert manifest(workspace.out)["drop_reasons"] == {"prompts.duplicate": 1}
    assert server.requests() == []


# ---- templates and model folders


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{{ task }}", r"must use {{ answer }}, {{ task }}; it uses {{ task }}"),
        ("hello", "it uses nothing"),
        ("{{ task }} {{ answer }} {{ name }}", r"it uses {{ answer }}, {{ name }}, {{ task }}"),
        ("{{ task }} {% if %}", "is not a Jinja template"),
        ("{{ task }} {{ answer", "is not a Jinja template"),
    ],
)
def test_a_wrong_template(workspace, server, text, match):
    template = workspace.path / "own.j2"
    template.write_text(text)
    reviser = {"url": server.url, "model": "m", "template": str(template)}
    refuse(workspace, server, "build", workspace.recipe(reviser=reviser), "--update", match=match)


@pytest.mark.parametrize(
    "text",
    [
        "{{ task }} {{ answer }} {{ task.__class__.__mro__ }}",
        "{{ task }} {{ answer }} {{ answer.missing }}",
        "{{ task }} {{ answer }} {{ 1 / 0 }}",
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_before_any_request(workspace, server, text):
    template = workspace.path / "own.j2"
    template.write_text(text)
    reviser = {"url": server.url, "model": "m", "template": str(template)}
    refuse(workspace, server, "build", workspace.recipe(reviser=reviser), "--update", match="template .*own.j2")


def model_folder(path: Path, missing: str = "nothing") -> Path:
    """The files of a chat model without one thing."""
    path.mkdir()
    settings = {"chat_template": "{{ messages }}", "eos_token": "<|end|>"}
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != missing}))
    if (path / missing).exists():
        (path / missing).unlink()
    return path


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        ("chat_template", "target: the tokenizer in .* has no chat template; use a chat model"),
        ("eos_token", r"target: the tokenizer in .* has no end-of-turn token \(eos_token\)"),
        ("config.json", r"target: .* holds no config.json with \*.safetensors"),
        ("model.safetensors", r"target: .* holds no config.json with \*.safetensors"),
        ("tokenizer_config.json", "target: the tokenizer in .* has no chat template"),
    ],
)
def test_a_wrong_model_folder(workspace, server, missing, match):
    folder = model_folder(workspace.path / "model", missing)
    write_prompts(workspace.path / "prompts.jsonl", [{"prompt": "a"}])
    refuse(workspace, server, "build", workspace.recipe(target={"path": str(folder)}), "--update", match=match)


def test_an_option_that_a_local_model_does_not_understand(workspace, server):
    target = {"path": str(model_folder(workspace.path / "model")), "extra": {"top_q": 0.9}}
    refuse(
        workspace,
        server,
        "build",
        workspace.recipe(target=target),
        "--update",
        match=r"target: a local model does not understand the option 'top_q' \(did you mean 'top_p'\?\); allowed",
    )


def test_a_tokenizer_config_that_is_not_json(workspace, server):
    folder = model_folder(workspace.path / "model")
    (folder / "tokenizer_config.json").write_text("{")
    refuse(
        workspace,
        server,
        "build",
        workspace.recipe(target={"path": str(folder)}),
        "--update",
        match="tokenizer_config.json",
    )


# ---- folders


def test_a_folder_of_another_recipe(workspace, server):
    refuse(
        workspace,
        server,
        "build",
        workspace.recipe(seed=7),
        match=r"holds the run of another recipe \(it differs in seed\); choose another --out, or add --update",
    )


def test_a_recipe_that_changed_since_the_last_run(workspace, server):
    reviser = {"url": server.url, "model": "m", "temperature": 0.1, "system": "Be kind."}
    refuse(
        workspace,
        server,
        "build",
        workspace.recipe(reviser=reviser, filters={"allusion": False}),
        match=r"it differs in filters.allusion, reviser.system, reviser.temperature\)",
    )


def test_a_folder_that_holds_something_else(workspace, server):
    (workspace.path / "else").mkdir()
    (workspace.path / "else" / "thesis.tex").write_text("mine")
    refuse(
        workspace,
        server,
        "build",
        workspace.recipe(out=str(workspace.path / "else")),
        match="is not a dataset folder and not empty .it holds thesis.tex.; choose another --out",
    )
    assert [f.name for f in (workspace.path / "else").iterdir()] == ["thesis.tex"]


def test_an_out_that_is_a_file(workspace, server):
    (workspace.path / "file").write_text("mine")
    refuse(
        workspace, server, "build", workspace.recipe(out=str(workspace.path / "file")), match="is a file, not a folder"
    )
    assert (workspace.path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["recipe.json", "manifest.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_record_of_ours_that_was_damaged(workspace, server, name, content):
    (workspace.out / name).write_text(content)
    refuse(
        workspace,
        server,
        "build",
        workspace.recipe(),
        match=f"{name} is damaged .*; delete it and run the same command",
    )
    (workspace.out / name).unlink()
    assert clair("build", workspace.recipe()).code == 0


def test_a_ledger_that_is_damaged(workspace, server):
    (workspace.out / "ledger.sqlite").write_bytes(b"\xff" * 5000)
    refuse(
        workspace, server, "build", workspace.recipe(), match="ledger .* is damaged .* and no reply can be read in it"
    )


@pytest.mark.parametrize("command", [["stats"], ["show"], ["report"]])
def test_a_folder_without_a_dataset(workspace, server, command):
    refuse(workspace, server, *command, workspace.path / "nowhere", match="holds no finished dataset")


def test_a_split_that_is_not_there(workspace, server):
    refuse(
        workspace,
        server,
        "show",
        workspace.out,
        "--split",
        "tarin",
        match=r"unknown split 'tarin' \(did you mean 'train'\?\); allowed: train, test",
    )


# ---- endpoints: errors at the first request, and nothing is paid


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """An endpoint that wants a key."""
    with running(ServerOptions(api_key="right-key")) as server:
        yield server


ENDPOINTS: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "wrong key": (
        lambda url: {"url": url, "model": "world-reviser", "api_key_env": "TEST_KEY"},
        r"refuses the key \(401: Incorrect API key provided.\); check api_key_env and the variable it names",
    ),
    "no key": (lambda url: {"url": url, "model": "world-reviser"}, "refuses the key"),
    "wrong port": (
        lambda url: {"url": "http://127.0.0.1:9/v1", "model": "world-reviser"},
        "cannot reach http://127.0.0.1:9/v1 .*; check the url in the recipe",
    ),
    "wrong host": (
        lambda url: {"url": "http://no-such-host.invalid/v1", "model": "world-reviser"},
        "cannot reach http://no-such-host.invalid/v1",
    ),
    "wrong path": (
        lambda url: {"url": url.removesuffix("/v1"), "model": "world-reviser", "api_key_env": "RIGHT_KEY"},
        "is not the base URL of an OpenAI-compatible API",
    ),
    "unknown model": (
        lambda url: {"url": url, "model": "gpt-9", "api_key_env": "RIGHT_KEY"},
        "has no model 'gpt-9', or is not the base URL .*check model and url",
    ),
}


@pytest.mark.parametrize("name", ENDPOINTS)
def test_a_wrong_endpoint(workspace, guarded, monkeypatch, name):
    monkeypatch.setenv("TEST_KEY", "wrong-key")
    monkeypatch.setenv("RIGHT_KEY", "right-key")
    reviser, match = ENDPOINTS[name]
    paid, snapshot = guarded.stats()["paid_total"], workspace.snapshot()
    recipe = workspace.recipe(reviser=reviser(guarded.url))
    line = error_line(clair("build", recipe, "--update"))
    assert re.search(match, line), line
    assert guarded.stats()["paid_total"] == paid
    new_snapshot = workspace.snapshot()
    for file in (*snapshot,):
        if file not in ("recipe.json", "ledger.sqlite"):
            assert new_snapshot[file] == snapshot[file]
    assert clair("stats", workspace.out).code == 0


@pytest.mark.parametrize("name", ENDPOINTS)
def test_a_wrong_endpoint_can_be_put_right_in_the_recipe_without_more_ado(tmp_path, server, guarded, monkeypatch, name):
    """Nothing was paid and nothing was made, so that the corrected recipe is not another recipe."""
    monkeypatch.setenv("TEST_KEY", "wrong-key")
    monkeypatch.setenv("RIGHT_KEY", "right-key")
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 3))
    reviser, _ = ENDPOINTS[name]
    assert clair("build", write_recipe(tmp_path, server.url, reviser=reviser(guarded.url))).code == 2
    assert clair("build", write_recipe(tmp_path, server.url)).code == 0
    assert len(pairs(tmp_path / "out")) == 3


def test_a_single_unusable_reply_is_no_error(workspace, server):
    write_prompts(workspace.path / "prompts.jsonl", scripted_rows(["ok", "null", "length"]))
    assert clair("build", workspace.recipe()).code == 0
    assert manifest(workspace.out)["drop_reasons"] == {"reviser.empty_reply": 1, "reviser.truncated": 1}
