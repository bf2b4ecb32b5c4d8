"""Build the four data sets of the mini grid from the same prompts, cut to the same number of response tokens.

    python -m recipes.experiments.paper_mini.data [--small]       # after its module models

`clair build` builds each against the embedded server, whose judge sometimes errs and prefers long answers. Then pairs
are taken from each in the order of the prompts until the smallest set's tokens are reached, or `MAX_TRAIN_TOKENS`.

    runs/mini/built/NAME     the dataset folder as `clair build` left it
    runs/mini/pairs/NAME     the pairs that are trained on (train) and held out (test), within the budget
    runs/mini/data.json      per set: pairs, response tokens, contrast, and the SHA-256 of its files
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import read_json, write_atomically, write_json
from clair.data.dataset import CONTRAST, SPLITS, read_manifest, read_rows, schema, split_file
from recipes.world.judge import Leanings
from recipes.world.quickstart import SOME_ROWS_FAILED, command
from recipes.world.running import ROOT, running
from recipes.world.server import ServerOptions
from recipes.world.tasks import Task, distinct_tasks, write_prompts

DATA = ("clair", "on_policy", "off_policy", "stronger")
RECIPES = Path("recipes/experiments/paper_mini")
MODELS = Path("runs/mini/models")
OTHERS = ("wordy", "terse")
PROMPTS, SMALL_PROMPTS = 900, 320
MAX_TRAIN_TOKENS = 20_000
"""Maximal response tokens to train on: a grid of this many runs takes about an hour."""
SERVER = ServerOptions(max_seconds=1800, polish=True, leanings=Leanings(style=True, judge_error=0.05, length_bias=0.10))
"""The reviser also improves the wording. The judge prefers correctness to wording, errs in 1 of 20 requests, and
prefers the longer answer in 1 of 10."""


def run_folder(small: bool) -> Path:
    """The folder of a full or a small grid."""
    return Path("runs/mini-small" if small else "runs/mini")


def write_prompt_files(run: Path, models: Path, tasks: Sequence[Task]) -> None:
    """Write the prompts alone, and with the answers of two other models, which are sampled once and kept."""
    run.mkdir(parents=True, exist_ok=True)
    write_prompts(run / "prompts.jsonl", list(tasks))
    from clair.inference.model_folder import weights_identity
    from recipes.experiments.paper_mini.answers import answers

    sampled, identity = run / "sampled.json", {name: weights_identity(models / name) for name in OTHERS}
    identity |= {"tasks": hashlib.sha256("".join(task.id for task in tasks).encode()).hexdigest()}
    if not sampled.exists() or read_json(sampled)["asked"] != identity:
        answers_by_model = {
            name: answers(models / name, tasks, temperature=1.0, seed=index) for index, name in enumerate(OTHERS)
        }
        write_json(sampled, {"asked": identity, "said": answers_by_model})
    answers_by_model = read_json(sampled)["said"]
    rows = [
        {"id": task.id, "prompt": task.prompt, "answers": [answers_by_model[name][index] for name in OTHERS]}
        for index, task in enumerate(tasks)
    ]
    write_atomically(run / "answered.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def settings(name: str, run: Path, models: Path, url: str) -> dict[str, str]:
    """The overrides of a recipe for this run: folders, and the server's address."""
    values: dict[str, str] = {"ledger": str(run / "ledger.sqlite"), "out": str(run / "built" / name)}
    values["prompts.path"] = str(run / ("answered.jsonl" if name == "off_policy" else "prompts.jsonl"))
    if name != "off_policy":
        values["target.path"] = str(models / "target")
    if name == "stronger":
        values["stronger.path"] = str(models / "stronger")
    else:
        values[f"{'reviser' if name == 'clair' else 'judge'}.url"] = url
    return values


def build_all(run: Path, models: Path) -> None:
    """Run `clair build` for each of the four data sets; a finished one costs no request."""
    with running(SERVER) as server:
        for name in DATA:
            options = [f"--set={key}={value}" for key, value in settings(name, run, models, server.url).items()]
            command("clair", "build", RECIPES / f"{name}.yaml", *options, allowed=(0, SOME_ROWS_FAILED))


# ---- the same budget


def response_tokens(row: Mapping[str, Any], tokenizer: Any) -> int:
    """Tokens of both answers, each with its end of turn."""
    texts = [row[side][-1]["content"] for side in ("chosen", "rejected")]
    return sum(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def within(counts: Sequence[int], budget: int) -> int:
    """The number of leading pairs within a budget of tokens, given the tokens of each."""
    spent = 0
    for index, count in enumerate(counts):
        spent += count
        if spent > budget:
            return index
    return len(counts)


def cut_all(run: Path, models: Path) -> dict[str, Any]:
    """Cut each split of the four data sets to the tokens of the smallest. Returns the contents of data.json.

    Raises UserError if a split has fewer than two pairs.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    rows = {name: {s: list(read_rows(run / "built" / name, [s])) for s in SPLITS} for name in DATA}
    counts = {n: {s: [response_tokens(row, tokenizer) for row in rows[n][s]] for s in SPLITS} for n in DATA}
    budget = {split: min(sum(counts[name][split]) for name in DATA) for split in SPLITS}
    budget["train"] = min(budget["train"], MAX_TRAIN_TOKENS)
    summary: dict[str, Any] = {}
    for name in DATA:
        summary[name] = {"built": read_manifest(run / "built" / name)["counts"], "sha256": {}}
        for split in SPLITS:
            count = within(counts[name][split], budget[split])
            if count < 2:
                raise UserError(
                    f"{run / 'built' / name}: {count} {split} pairs are within the budget of {budget[split]} tokens "
                    "that the smallest set gives; ask for more prompts"
                )
            selected, file = rows[name][split][:count], run / "pairs" / name / split_file(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(selected, schema=schema()), file)
            summary[name] |= {split: count, f"{split}_tokens": sum(counts[name][split][:count])}
            summary[name]["sha256"][split] = hashlib.sha256(file.read_bytes()).hexdigest()
        selected = rows[name]["train"][: summary[name]["train"]]
        summary[name]["contrast"] = {
            metric: sum(row["contrast"][metric] for row in selected) / len(selected) for metric in CONTRAST
        }
    write_json(run / "data.json", summary)
    return summary


def prepare(run: Path, models: Path, prompts: int) -> dict[str, Any]:
    """Make the prompts, the four data sets and their cut. Raises UserError if a model is missing."""
    for name in ("target", "stronger", *OTHERS):
        if not (models / name / "config.json").exists():
            command = f"python -m recipes.experiments.paper_mini.models --out {models}"
            raise UserError(f"{models / name} is not there; make it with: {command}")
    write_prompt_files(run, models, distinct_tasks("train", prompts, seed=0))
    build_all(run, models)
    return cut_all(run, models)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the mini grid's four data sets.")
    parser.add_argument("--small", action="store_true", help=f"{SMALL_PROMPTS} prompts, into runs/mini-small")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--out", type=Path, help="runs/mini, or runs/mini-small")
    args = parser.parse_args()
    os.chdir(ROOT)
    try:
        summary = prepare(args.out or run_folder(args.small), args.models, SMALL_PROMPTS if args.small else PROMPTS)
    except UserError as error:
        raise SystemExit(f"mini: {error}") from None
    for name, dataset in summary.items():
        contrast, tokens = dataset["contrast"], dataset["train_tokens"]
        print(
            f"{name}: {dataset['train']} + {dataset['test']} pairs, {tokens} response tokens to train on, "
            f"Jaccard {contrast['jaccard']:.2f}, Levenshtein {contrast['levenshtein']:.1f}"
        )


if __name__ == "__main__":
    main()
