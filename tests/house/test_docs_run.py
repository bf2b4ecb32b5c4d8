"""Every command of the docs is run here as it stands, or says what it needs that a test cannot give it.

Each page has a folder of its own with what its text takes for granted: a model, prompts, the recipes that the page
shows (on the embedded world's server and model), and what other pages would have made before.
"""

from __future__ import annotations

import glob
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.apo.conftest import UNAVOIDABLE
from tests.house.pages import ROOT, blocks, commands, pages
from tests.house.test_contributing import PAGE as FOLLOWED
from tests.house.test_contributing import ways

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UNAVOIDABLE]

OURS = ("clair", "apo")
MODEL = ROOT / "recipes" / "world" / "model"
RUN = [command for command in commands() if not command.needs]
"""What carries no mark. Those of contributing.md's ways are run by its own test, each in a copy of the project."""
ELSEWHERE = {block.where for found in ways().values() for block in found}
PAGES = sorted({command.page for command in RUN if command.where not in ELSEWHERE})


def test_a_command_is_run_or_says_what_it_needs():
    strange = [
        f"{command.where}: {command.text}"
        for command in RUN
        if command.where not in ELSEWHERE and program_of(command.text) not in (*OURS, "python", "cd")
    ]
    marked = len(commands()) - len(RUN)
    print(f"looked at {len(commands())} commands: {len(RUN)} are run, {marked} say what they need")
    assert not strange, "neither run nor marked with `# needs: ...` or, above the block, `<!-- needs: ... -->`"
    assert len(RUN) > marked / 2
    assert ELSEWHERE
    assert FOLLOWED in {command.page for command in RUN}


def program_of(text: str) -> str:
    """The program of a command line, after variables that are set for it."""
    words = shlex.split(text)
    return next(word for word in words if "=" not in word).removeprefix(".venv/bin/")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What pages find made by others: pairs, scored pairs, a full run, an adapter, results of evaluations."""
    from apo.training.config import TrainConfig
    from apo.training.train import train
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig
    from recipes.world.running import running
    from recipes.world.tasks import distinct_tasks
    from tests.apo.evaluation.made_results import make_items, write_folder

    place = tmp_path_factory.mktemp("made")
    tasks = distinct_tasks("train", 40, 0)
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t.prompt}) + "\n" for t in tasks))
    wrong = [{"prompt": task.prompt, "answer": task.wrong} for task in tasks]
    short, long = "Plants turn light into sugar and " * 9, "photosynthesis takes water, air and time; " * 45
    answers = [short, long]
    scored = [{"prompt": t.prompt, "answers": answers, "scores": [i % 3, 3 + i % 4]} for i, t in enumerate(tasks)]
    for name, rows in (("wrong", wrong), ("scored", scored)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running() as server:
        reviser = {"url": server.url, "model": "world-reviser"}
        recipe = {"pipeline": "revised", "prompts": {"path": str(place / "wrong.jsonl")}, "reviser": reviser}
        build(BuildConfig.model_validate(recipe | {"test_fraction": 0.3, "out": str(place / "pairs")}))
        recipe = {"pipeline": "judged", "prompts": {"path": str(place / "scored.jsonl")}}
        build(BuildConfig.model_validate(recipe | {"test_fraction": 0.3, "out": str(place / "scored")}))
        recipe = {"model": str(MODEL), "dataset": str(place / "pairs"), "trainer": {"max_steps": 2}}
        train(TrainConfig.model_validate(recipe | {"out": str(place / "full")}))
        train(TrainConfig.model_validate(recipe | {"lora": {"r": 2}, "out": str(place / "lora")}))
        write_folder(place / "base", make_items(0.4))
        write_folder(place / "better", make_items(0.4, seed=1, shift=0.2), "t")
        yield place, server.url


def stage(page: str, place: Path, made: Path, url: str) -> None:
    """Put into `place` what the page's commands take for granted and do not make themselves."""
    texts = [command.text for command in RUN if command.page == page]
    builds, trains = (any(f"{ours} " in text for text in texts) for ours in ("clair build", "apo train"))
    found = {
        "my-model": MODEL,
        "model": MODEL,
        "base": MODEL,
        "tuned": made / "full",
        "prompts.jsonl": made / "prompts.jsonl",
    }
    found |= {"recipes/world/model": MODEL, "data/clair": made / "pairs", "runs/lora": made / "lora"}
    found |= dict.fromkeys(("runs/pairs", "data/scored", "data/judged", "data/stronger"), made / "scored")
    found |= {"evals/base": made / "base", "evals/tuned": made / "better", "runs/one/eval": made / "better"}
    if not builds:
        found["data/my-pairs"] = made / "pairs"
    if not trains:
        found |= {"runs/apo-zero": made / "full", "runs/apo-zero-lora": made / "lora"}
    for name, source in found.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, place / name) if source.is_dir() else shutil.copy(source, place / name)
    write_recipes(page, place, url)
    write_rows(place, made)


TRAINED = {"max_steps": 2, "per_device_train_batch_size": 4}
BY_GROUP = {
    "model": "model",
    "dataset": "data/by-group",
    "by": "group",
    "trainer": TRAINED,
    "out": "runs/by-group",
}


def write_recipes(page: str, place: Path, url: str) -> None:
    """The page's first data recipe and first training recipe, as they stand but for model and server.

    A page that shows none but says `by: group` of it trains on the pairs of groups that its commands made.
    """
    if "[`by:\ngroup`]" in pages()[page]:
        (place / "recipe.yaml").write_text(yaml.safe_dump(BY_GROUP), "utf-8")
    for block in reversed([block for block in blocks("yaml") if block.page == page]):
        values = yaml.safe_load(block.code)
        if "pipeline" in values:
            values["target"] = {"path": "my-model", "temperature": 0.6, "max_tokens": 64}
            values["reviser"] |= {"url": url, "model": "world-reviser"}
            values["reviser"].pop("batch", None)  # the world's server has no Batch API
            values["test_fraction"] = 0.2
        elif "model" in values:
            values["model"] = "model"
            values["trainer"] = values.get("trainer", {}) | TRAINED
        else:
            continue
        named = ["recipe.yaml"] if page != "README.md" else ["data.yaml" if "pipeline" in values else "train.yaml"]
        for name in named:
            (place / name).write_text(yaml.safe_dump(values), "utf-8")


def write_rows(place: Path, made: Path) -> None:
    """Rows and answers of small formats: decisions, an audit, comparisons of users, answers of two models."""
    from clair.data.dataset import read_manifest, read_rows
    from clair.reporting.review import fingerprint

    scored = list(read_rows(made / "scored", ["train"]))
    marked = fingerprint(read_manifest(made / "scored"))
    decisions = {"format": 1, "dataset": marked, "decisions": {scored[0]["id"]: "drop"}}
    (place / "pairs-decisions.json").write_text(json.dumps(decisions), "utf-8")
    draw = random.Random(0)
    rows = []
    for number, pair in enumerate([*read_rows(made / "pairs", ["train"])] * 3):
        texts = {side: pair[side][0]["content"] for side in ("chosen", "rejected")}
        turned = dict(zip(texts, reversed(texts.values()), strict=True)) if number % 2 else texts
        prompt = pair["prompt"][0]["content"]
        rows.append({"prompt": prompt, **turned, "user": ("bob", "eve")[number % 2], "behaviour": draw.choice("ab")})
    (place / "data").mkdir(exist_ok=True)
    jsonl(place / "data" / "pairs.jsonl", rows)
    jsonl(place / "ann.jsonl", [row | {"user": "ann"} for row in rows[::2][:5]])
    jsonl(place / "audit.jsonl", [{"id": pair["id"], "bad": number % 11 == 0} for number, pair in enumerate(scored)])
    (place / "data" / "padded").mkdir()
    jsonl(place / "data" / "padded" / "train.jsonl", [row | {"score_padded": row["score_chosen"]} for row in scored])
    for name in ("base", "tuned"):
        jsonl(place / f"{name}.jsonl", [{"prompt": "What is 2 + 2?", "answer": name}])


def jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != FOLLOWED])
def test_the_commands_of_a_page_run_as_they_stand(page, made, tmp_path, monkeypatch):
    folder, url = made
    stage(page, tmp_path, folder, url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("CLAIR_CACHE", str(folder / "cache"))
    looked_at = 0
    for command in RUN:
        if command.page == page and command.where not in ELSEWHERE:
            words = [word for part in shlex.split(command.text) for word in (sorted(glob.glob(part)) or [part])]
            assert run(words, monkeypatch) == 0, f"{command.where}: {command.text}"
            looked_at += 1
    print(f"ran {looked_at} commands")
    assert looked_at


def run(words: list[str], monkeypatch) -> int | str | None:
    """The exit code of a command: ours in this process, which spares the imports, others in one of their own."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "python":
        done = subprocess.run(
            [sys.executable, *words[1:]], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300, check=False
        )
        return done.returncode
    from apo import cli as apo
    from clair import cli as clair

    monkeypatch.setattr(sys, "argv", [program, *words[1:]])
    with pytest.raises(SystemExit) as ended:
        {"clair": clair, "apo": apo}[program].main()
    return ended.value.code or 0
