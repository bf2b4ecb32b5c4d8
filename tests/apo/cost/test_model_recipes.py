"""The recipes for real models and for the paper, resolved and planned on folders that hold a config and no weight."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from apo.cost import sizes as shapes
from clair.core.recipe import load_recipe
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from recipes.experiments.model_plans import plan
from tests.apo.command import call

PARAMETERS = {
    "Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "SmolLM3-3B-it-SFT": 3_075_098_624,
}
HARDWARE = {
    "llama32_1b_lora": "RTX 4090 24GB", "llama3_8b_full": "A100 80GB", "llama3_8b_lora": "A100 80GB",
    "llama3_8b_qlora": "RTX 4090 24GB", "smollm3_3b": "A100 80GB", "train": "A100 80GB",
}  # fmt: skip
ALL = sorted(file for folder in ("models", "paper") for file in (plan.RECIPES / folder).glob("*.yaml"))
DATA = [file for file in ALL if file not in plan.training_recipes()]


def planned(file: Path, folder: Path, pairs: Path, monkeypatch, capsys) -> str:
    """The output of the dry run in the recipe's header, on a machine that is too small for the recipe."""
    model = plan.config_only(yaml.safe_load(file.read_text("utf-8"))["model"], folder / file.stem)
    overrides = ["--set", f"model={model}", "--set", f"dataset={pairs}", "--out", folder / "run"]
    assert call(monkeypatch, "train", file, "--dry-run", *plan.processes_of(file), *overrides) == 2
    output, refused = capsys.readouterr()
    assert refused.splitlines()[-1].startswith("error: the run needs about ")
    assert "Traceback" not in refused
    return output


@pytest.fixture
def tiny_machine(monkeypatch):
    tiny = shapes.Device("this machine: CPU", shapes.GIB, 1e9, is_gpu=False)
    monkeypatch.setattr(shapes, "this_machine", lambda: tiny)


def test_every_training_recipe_resolves_and_fits_the_hardware_that_it_names(
    tiny_machine, tmp_path, monkeypatch, capsys
):
    recipes = plan.training_recipes()
    assert {file.stem for file in recipes} == set(HARDWARE)
    pairs = plan.write_pairs(tmp_path / "pairs.jsonl", 40)
    for file in recipes:
        output = planned(file, tmp_path, pairs, monkeypatch, capsys)
        lines = plan.lines_of(output)
        assert lines[HARDWARE[file.stem]].fits, output
        assert lines["RTX 4090 24GB"].fits == (file.stem not in ("llama3_8b_full", "train"))
        name = yaml.safe_load(file.read_text("utf-8"))["model"].rpartition("/")[2]
        assert f"parameters: {PARAMETERS[name]:,}" in output
        assert "# train: 40 pairs\n" in output, "none is too long"
    print(f"looked at {len(recipes)} training recipes")
    assert len(recipes) == 6


@pytest.mark.slow
def test_the_table_of_the_page_is_what_dry_runs_say(tiny_machine, tmp_path, monkeypatch, capsys):
    text = plan.PAGE.read_text("utf-8")
    rows = re.search(r"<!-- planned -->\n\|.*\n\|.*\n((?:\|.*\n)+)", text)[1].splitlines()
    pairs = plan.write_pairs(tmp_path / "pairs.jsonl")
    recipes = plan.training_recipes()
    assert rows == [plan.row_of(file, planned(file, tmp_path, pairs, monkeypatch, capsys)) for file in recipes]


def test_every_data_recipe_resolves_and_asks_as_many_calls_as_the_page_says(tmp_path, monkeypatch, capsys):
    from clair.pipeline.estimate import estimate

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    row = {"answers": ["one", "two"], "scores": [1.0, 2.0]}
    for name, more in (("prompts", {}), ("answered", row)):
        rows = [json.dumps({"prompt": f"question {number}", **more}) + "\n" for number in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), "utf-8")
    calls = {}
    for file in DATA:
        prompts = Path(yaml.safe_load(file.read_text("utf-8"))["prompts"]["path"]).name
        overrides = [f"prompts.path={tmp_path / prompts}", f"out={tmp_path / file.stem}"]
        config = load_recipe(BuildConfig, file, overrides)
        assert config.models == {} or config.budget
        calls[f"{file.parent.name}/{file.stem}"] = {role: of.max_calls for role, of in estimate(config).items()}
    print(f"looked at {len(DATA)} data recipes")
    assert calls == {
        "models/clair": {"target": 10, "reviser": 20},
        "paper/clair": {"target": 10, "reviser": 20},
        "paper/off_policy": {},
        "paper/on_policy": {"target": 20, "judge": 20},
        "paper/stronger": {"target": 10, "stronger": 10},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clair", "on_policy", "stronger"])
def test_the_papers_data_recipes_build_on_the_embedded_world(name, tmp_path, monkeypatch):
    """As they stand, but for where the models are: the tiny model answers, and its server revises and judges."""
    from recipes.world.running import running
    from recipes.world.tasks import distinct_tasks

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    rows = [json.dumps({"prompt": task.prompt}) + "\n" for task in distinct_tasks("train", 16, 0)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows), "utf-8")
    local = {"url": None, "model": None, "path": str(plan.RECIPES / "world" / "model"), "extra": {}, "temperature": 1.0}
    with running() as server:
        served = {"reviser": "world-reviser", "judge": "world-judge"}
        values = yaml.safe_load((plan.RECIPES / "paper" / f"{name}.yaml").read_text("utf-8"))
        for role in ("target", "stronger", "reviser", "judge"):
            if role in values:
                values[role] |= {"url": server.url, "model": served[role]} if role in served else local
        local_keys = {"prompts": {"path": str(tmp_path / "prompts.jsonl")}, "ledger": str(tmp_path / "ledger.sqlite")}
        built = build(BuildConfig.model_validate(values | local_keys | {"out": str(tmp_path / name)}))
    counts = built.manifest["counts"]
    assert counts["prompts"] == 16
    assert counts["pairs"] >= 2, built.manifest["drop_reasons"]
    assert built.failed == 0


def test_each_training_recipe_gives_its_four_commands_and_says_what_is_a_guess():
    for file in plan.training_recipes():
        head = file.read_text("utf-8").partition("\nmodel:")[0]
        commands = [line.split()[1:] for line in head.splitlines() if line.startswith("#     ")]
        programs = [" ".join(arguments[:2]) for arguments in commands if arguments[0] in ("clair", "apo")]
        assert {"clair build", "apo train", "apo eval", "apo compare"} <= {*programs}, file.name
        assert "guess" in head.lower(), file.name
        assert "Not run" in head, file.name
    for file in DATA:
        assert f"clair build recipes/{file.parent.name}/{file.name}" in file.read_text("utf-8")


# ---- UltraFeedback's prompts


def feedback(*completions: tuple[str, float | None], prompt: str = "What is 2 + 2?") -> dict:
    return {
        "instruction": prompt,
        "completions": [{"response": text, "overall_score": score} for text, score in completions],
    }


def test_ultrafeedback_becomes_prompts_alone_and_prompts_with_scored_answers(tmp_path, monkeypatch, capsys):
    from recipes.experiments.paper import ultrafeedback

    source = tmp_path / "feedback.jsonl"
    source_rows = [
        feedback(("Four.", 9.0), ("Five.", 2.5), ("", 5.0), ("Six.", None)),
        feedback(("Even.", 7.0), ("Odd.", 7.0), prompt="Is 4 even?"),
        feedback(("Alone.", 7.0), prompt="Who is there?"),
        feedback(prompt="Nobody answers?"),
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in source_rows), "utf-8")
    monkeypatch.setattr("sys.argv", ["ultrafeedback", "--source", str(source), "--count", "4", "--out", str(tmp_path)])
    ultrafeedback.main()
    assert "4 prompts" in capsys.readouterr().out
    read = {name: (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("prompts", "answered")}
    assert [set(json.loads(line)) for line in read["prompts"]] == [{"id", "prompt"}] * 4
    assert len(read["answered"]) == 2
    first = json.loads(read["answered"][0])
    assert (first["answers"], first["scores"]) == (["Four.", "Five."], [9.0, 2.5])

    overrides = [f"prompts.path={tmp_path}/answered.jsonl", f"out={tmp_path}/off_policy"]
    built = build(load_recipe(BuildConfig, plan.RECIPES / "paper" / "off_policy.yaml", overrides))
    assert built.manifest["counts"]["pairs"] == 1
    assert built.manifest["drop_reasons"] == {"scores.tie": 1}, "the notebook would pair an answer with itself"


@pytest.mark.parametrize(
    ("rows", "says"),
    [([feedback()], "has 1 rows, fewer than the 2 requested"), ([{"prompt": "?"}] * 2, "a row without 'instruction'")],
)
def test_a_file_that_is_not_ultrafeedback_is_one_line(rows, says, tmp_path, monkeypatch, capsys):
    from recipes.experiments.paper import ultrafeedback

    source = tmp_path / "feedback.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    monkeypatch.setattr("sys.argv", ["ultrafeedback", "--source", str(source), "--count", "2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        ultrafeedback.main()
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2
    assert stderr.startswith("error: ")
    assert says in stderr
    assert not (tmp_path / "prompts.jsonl").exists()
