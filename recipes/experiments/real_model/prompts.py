"""Draw training and validation prompts: tasks with verifiable constraints, by seed; none is in IFEval.

    python -m recipes.experiments.real_model.prompts --data FOLDER --out FOLDER [--small]

FOLDER is the data folder: instructions/ (Self-Instruct's seed_tasks.jsonl and user_oriented.jsonl) and ifeval/
(input_data.jsonl). Rows have IFEval's form (key, prompt, instruction_id_list, kwargs) and an `id`. Training and
validation share no task. Eight constraint types, drawn by seed, never occur in either; `split.json` names them. Prompts
that share 13 words in a row with one of IFEval's are left out, as `prompts.not_in` does, and counted in that file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from clair.core.errors import UserError
from clair.core.files import content_hash, write_atomically, write_json
from clair.data.deduplication import BenchmarkQuestions
from recipes.experiments.real_model.constraints import TYPES, draw_constraints, unseen_types

SEED = 0
COUNTS, SMALL_COUNTS = {"train": 1400, "validation": 150}, {"train": 36, "validation": 10}
VALIDATION_TASKS = 0.2
MAX_CHARACTERS, MAX_WORDS = 160, 60
"""The longest task, and the longest example answer: a small model needs tasks with short answers."""
BREVITY = ("", "Keep it short.", "Answer in two or three sentences.")
"""A request for a short answer, drawn for each prompt. It is not a constraint that is checked."""
_UNFIT = re.compile(
    r"\b(?:code|python|sql|regex|regular expression|html|css|javascript|java|bash|program|function|latex|excel|yaml"
    r"|offensive|stereotype)\b",
    re.IGNORECASE,
)
"""Unsuitable tasks: about code, whose answers cannot be repaired by sentences, and about insults."""


@dataclass(frozen=True)
class PromptFiles:
    """The files of `write_prompts`."""

    folder: Path

    def of(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"


def read_tasks(data: Path) -> list[str]:
    """Read instruction and input of each suitable task. Raises UserError if a file is missing."""
    tasks = []
    for name in ("seed_tasks.jsonl", "user_oriented.jsonl"):
        for row in _rows(data / "instructions" / name):
            example = row["instances"][0]
            text = "\n\n".join(filter(None, [row["instruction"].strip(), example["input"].strip()]))
            short = len(text) <= MAX_CHARACTERS and len(example["output"].split()) <= MAX_WORDS
            if short and not row.get("is_classification") and not _UNFIT.search(text):
                tasks.append(text)
    return list(dict.fromkeys(tasks))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        raise UserError(f"{file} is missing; give the data folder with --data or CLAIR_SHARED (docs/contributing.md)")
    for line in file.read_text("utf-8").splitlines():
        yield json.loads(line)


def draw_prompts(tasks: Sequence[str], count: int, allowed: Sequence[str], random: Random) -> Iterator[dict[str, Any]]:
    """Yield the tasks in random order with new constraints, again and again, at most `count` times."""
    order = list(tasks)
    for _ in range(count):
        random.shuffle(order)
        for task in order:
            constraints = draw_constraints(task, allowed, random)
            brief = random.choice(BREVITY)
            prompt = "\n\n".join(
                [task, " ".join(filter(None, [brief, *(constraint.text for constraint in constraints)]))]
            )
            yield {
                "id": content_hash(prompt)[:12],
                "prompt": prompt,
                "instruction_id_list": [constraint.type for constraint in constraints],
                "kwargs": [dict(constraint.kwargs) for constraint in constraints],
            }


def write_prompts(data: Path, out: Path, counts: dict[str, int], seed: int = SEED) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl and split.json. Returns the content of split.json."""
    tasks, unseen = read_tasks(data), unseen_types(seed)
    allowed = [type for type in TYPES if type not in unseen]
    random = Random(f"prompts-{seed}")
    random.shuffle(tasks)
    held_out = round(VALIDATION_TASKS * len(tasks))
    benchmark = BenchmarkQuestions(row["prompt"] for row in _rows(data / "ifeval" / "input_data.jsonl"))
    summary: dict[str, Any] = {"seed": seed, "unseen": sorted(unseen)}
    for split, of_split in {"train": tasks[held_out:], "validation": tasks[:held_out]}.items():
        rows: dict[str, dict[str, Any]] = {}
        refused: set[str] = set()
        for row in draw_prompts(of_split, counts[split], allowed, random):
            if len(rows) == counts[split]:
                break
            if benchmark.overlaps(row["prompt"]):
                refused.add(row["prompt"])
            else:
                rows.setdefault(row["prompt"], {"key": len(rows), **row})
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
        write_atomically(PromptFiles(out).of(split), "".join(lines))
        types = Counter(type for row in rows.values() for type in row["instruction_id_list"])
        summary[split] = {"prompts": len(rows), "tasks": len(of_split), "near_ifeval": len(refused)}
        summary[split]["types"] = dict(sorted(types.items()))
    write_json(out / "split.json", summary)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw training and validation prompts.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        summary = write_prompts(args.data, args.out, SMALL_COUNTS if args.small else COUNTS)
    except UserError as error:
        raise SystemExit(f"real: {error}") from None
    for split in COUNTS:
        print(f"{split}: {summary[split]['prompts']} prompts of {summary[split]['tasks']} tasks")
    print(f"never in training: {', '.join(summary['unseen'])}")


if __name__ == "__main__":
    main()
