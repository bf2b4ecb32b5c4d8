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
from tests.house.pages import CONTRIBUTING, ROOT, blocks, commands, contributions, pages

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UNAVOIDABLE]

OURS = ("clair", "apo")
MODEL = ROOT / "recipes" / "world" / "model"
RUN = [command for command in commands() if not command.needs]
"""Commands without a mark. Those of contributing.md are run by its own test, each in a copy of the project."""
ELSEWHERE = {block.location for blocks in contributions().values() for block in blocks}
PAGES = sorted({command.page for command in RUN if command.location not in ELSEWHERE})


def test_a_command_is_run_or_says_what_it_needs():
    strange = [
        f"{command.location}: {command.text}"
        for command in RUN
        if command.location not in ELSEWHERE and program_of(command.text) not in (*OURS, "python", "cd")
    ]
    marked = len(commands()) - len(RUN)
    print(f"looked at {len(commands())} commands: {len(RUN)} are run, {marked} say what they need")
    assert not strange, "neither run nor marked with `# needs: ...` or, above the block, `<!-- needs: ... -->`"
    assert len(RUN) > marked / 2
    assert ELSEWHERE
    assert CONTRIBUTING in {command.page for command in RUN}


def program_of(text: str) -> str:
    """The program of a command line, after variables that are set for it."""
    arguments = shlex.split(text)
    return next(word for word in arguments if "=" not in word).removeprefix(".venv/bin/")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Inputs that pages presuppose: pairs, scored pairs, a full run, an adapter, results of evaluations."""
    from apo.training.config import TrainConfig
    from apo.training.train import train
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig
    from recipes.world.running import running
    from recipes.world.tasks import distinct_tasks
    from tests.apo.evaluation.made_results import make_items, write_folder

    folder = tmp_path_factory.mktemp("made")
    tasks = distinct_tasks("train", 40, 0)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t.prompt}) + "\n" for t in tasks))
    wrong = [{"prompt": task.prompt, "answer": task.wrong} for task in tasks]
    short, long = "Plants turn light into sugar and " * 9, "photosynthesis takes water, air and time; " * 45
    answers = [short, long]
    scored = [{"prompt": t.prompt, "answers": answers, "scores": [i % 3, 3 + i % 4]} for i, t in enumerate(tasks)]
    for name, rows in (("wrong", wrong), ("scored", scored)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running() as server:
        reviser = {"url": server.url, "model": "world-reviser"}
        recipe = {"pipeline": "revised", "prompts": {"path": str(folder / "wrong.jsonl")}, "reviser": reviser}
        build(BuildConfig.model_validate(recipe | {"test_fraction": 0.3, "out": str(folder / "pairs")}))
        recipe = {"pipeline": "judged", "prompts": {"path": str(folder / "scored.jsonl")}}
        build(BuildConfig.model_validate(recipe | {"test_fraction": 0.3, "out": str(folder / "scored")}))
        recipe = {"model": str(MODEL), "dataset": str(folder / "pairs"), "trainer": {"max_steps": 2}}
        train(TrainConfig.model_validate(recipe | {"out": str(folder / "full")}))
        train(TrainConfig.model_validate(recipe | {"lora": {"r": 2}, "out": str(folder / "lora")}))
        write_folder(folder / "base", make_items(0.4))
        write_folder(folder / "better", make_items(0.4, seed=1, shift=0.2), "t")
        yield folder, server.url


def stage(page: str, folder: Path, artifacts: Path, url: str) -> None:
    """Put into `folder` what the page's commands take for granted and do not make themselves."""
    texts = [command.text for command in RUN if command.page == page]
    builds, trains = (any(f"{ours} " in text for text in texts) for ours in ("clair build", "apo train"))
    sources = {
        "my-model": MODEL,
        "model": MODEL,
        "base": MODEL,
        "tuned": artifacts / "full",
        "prompts.jsonl": artifacts / "prompts.jsonl",
    }
    sources |= {"recipes/world/model": MODEL, "data/clair": artifacts / "pairs", "runs/lora": artifacts / "lora"}
    sources |= dict.fromkeys(("runs/pairs", "data/scored", "data/judged", "data/stronger"), artifacts / "scored")
    sources |= {
        "evals/base": artifacts / "base",
        "evals/tuned": artifacts / "better",
        "runs/one/eval": artifacts / "better",
    }
    sources |= {f"recipes/{name}": ROOT / "recipes" / name for name in ("analysis", "evaluation", "rewards")}
    if not builds:
        sources["data/my-pairs"] = artifacts / "pairs"
    if not trains:
        sources |= {"runs/apo-zero": artifacts / "full", "runs/apo-zero-lora": artifacts / "lora"}
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    write_recipes(page, folder, url)
    write_rows(folder, artifacts)


TRAINED = {"max_steps": 2, "per_device_train_batch_size": 4}
BY_GROUP = {
    "model": "model",
    "dataset": "data/by-group",
    "by": "group",
    "trainer": TRAINED,
    "out": "runs/by-group",
}


def write_recipes(page: str, folder: Path, url: str) -> None:
    """The page's first data recipe and first training recipe, with only model and server replaced.

    A page that shows none but says `by: group` of it trains on the pairs of groups that its commands made.
    """
    if "[`by: group`]" in pages()[page]:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(BY_GROUP), "utf-8")
    for block in reversed([block for block in blocks("yaml") if block.page == page]):
        values = yaml.safe_load(block.code)
        if block.title:
            (folder / block.title).write_text(block.code, "utf-8")
            continue
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
            (folder / name).write_text(yaml.safe_dump(values), "utf-8")


def write_rows(folder: Path, artifacts: Path) -> None:
    """Rows and answers of small formats: decisions, an audit, comparisons of users, answers of two models."""
    from clair.data.dataset import read_manifest, read_rows
    from clair.reporting.review import fingerprint

    scored = list(read_rows(artifacts / "scored", ["train"]))
    marked = fingerprint(read_manifest(artifacts / "scored"))
    decisions = {"format": 1, "dataset": marked, "decisions": {scored[0]["id"]: "drop"}}
    (folder / "pairs-decisions.json").write_text(json.dumps(decisions), "utf-8")
    draw = random.Random(0)
    rows = []
    for number, pair in enumerate([*read_rows(artifacts / "pairs", ["train"])] * 3):
        texts = {side: pair[side][0]["content"] for side in ("chosen", "rejected")}
        turned = dict(zip(texts, reversed(texts.values()), strict=True)) if number % 2 else texts
        prompt = pair["prompt"][0]["content"]
        rows.append({"prompt": prompt, **turned, "user": ("bob", "eve")[number % 2], "behaviour": draw.choice("ab")})
    (folder / "data").mkdir(exist_ok=True)
    jsonl(folder / "data" / "pairs.jsonl", rows)
    jsonl(folder / "ann.jsonl", [row | {"user": "ann"} for row in rows[::2][:5]])
    jsonl(folder / "audit.jsonl", [{"id": pair["id"], "bad": number % 11 == 0} for number, pair in enumerate(scored)])
    (folder / "data" / "padded").mkdir()
    jsonl(folder / "data" / "padded" / "train.jsonl", [row | {"score_padded": row["score_chosen"]} for row in scored])
    for name in ("base", "tuned"):
        jsonl(folder / f"{name}.jsonl", [{"prompt": "What is 2 + 2?", "answer": name}])


def jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != CONTRIBUTING])
def test_the_commands_of_a_page_run_as_they_stand(page, artifacts, tmp_path, monkeypatch):
    folder, url = artifacts
    stage(page, tmp_path, folder, url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("CLAIR_CACHE", str(folder / "cache"))
    count = 0
    for command in RUN:
        if command.page == page and command.location not in ELSEWHERE:
            arguments = [word for piece in shlex.split(command.text) for word in (sorted(glob.glob(piece)) or [piece])]
            assert run(arguments, monkeypatch) == 0, f"{command.location}: {command.text}"
            count += 1
    print(f"ran {count} commands")
    assert count


def run(arguments: list[str], monkeypatch) -> int | str | None:
    """The exit code of a command: ours in this process, which spares the imports, others in one of their own."""
    program = arguments[0].removeprefix(".venv/bin/")
    if program == "python":
        result = subprocess.run(
            [sys.executable, *arguments[1:]], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300, check=False
        )
        return result.returncode
    from apo import cli as apo
    from clair import cli as clair

    monkeypatch.setattr(sys, "argv", [program, *arguments[1:]])
    with pytest.raises(SystemExit) as exit_info:
        {"clair": clair, "apo": apo}[program].main()
    return exit_info.value.code or 0
