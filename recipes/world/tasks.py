"""Tasks: drawn from the skills by seed, split by content, solved from their text alone, scored by exact answer.

python -m recipes.world.tasks --split train --count 1000 --out prompts.jsonl [--answers]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from random import Random

from recipes.world.skills import SKILLS
from recipes.world.skills.skill import Skill, Template, Values, pattern

# Per cent of all contents. A content lies in exactly one split, whatever its phrasing.
SPLITS = {"pretrain": 65, "train": 20, "validation": 7, "heldout": 8}


@dataclass(frozen=True)
class Task:
    """One task: `id` hashes skill and prompt; `right` and `wrong` are sentences that differ in the value only."""

    id: str
    skill: str
    template: str
    content: str
    prompt: str
    right: str
    wrong: str
    right_value: str
    wrong_value: str

    @property
    def split(self) -> str:
        return split_of(self.skill, self.content)


def split_of(skill: str, content: str) -> str:
    """The one split that this content belongs to, by its hash."""
    bucket = int.from_bytes(hashlib.sha256(f"{skill}:{content}".encode()).digest()[:8]) % 100
    for split, share in SPLITS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares of SPLITS do not add up to 100")


def make_task(skill: Skill, template: Template, values: Values) -> Task | None:
    """The task with these slot values, or None if they make no task (see `Skill.judge`)."""
    verdict = skill.judge(values)
    if verdict is None:
        return None
    prompt = template.question.format_map(values)
    return Task(
        id=hashlib.sha256(f"{skill.name}:{prompt}".encode()).hexdigest()[:16],
        skill=skill.name,
        template=template.id,
        content=skill.content(values),
        prompt=prompt,
        right=template.answer.format_map({**values, "value": verdict.right}),
        wrong=template.answer.format_map({**values, "value": verdict.wrong}),
        right_value=verdict.right,
        wrong_value=verdict.wrong,
    )


def draw_tasks(split: str, seed: int) -> Iterator[Task]:
    """An endless stream of tasks of one split, skills and templates in turn; texts may repeat."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of: {', '.join(SPLITS)}")
    rng = Random(f"{split}-{seed}")
    turns = [(skill, t) for n in range(8) for skill in SKILLS.values() for t in skill.templates[n : n + 1]]
    for skill, template in cycle(turns):
        task = None
        # About one draw in three makes a task of this split, fewer for sums and the small splits.
        while task is None or task.split != split:
            task = make_task(skill, template, skill.draw(rng))
        yield task


def distinct_tasks(split: str, count: int, seed: int) -> list[Task]:
    """`count` tasks of one split with distinct prompts."""
    return list(islice(_distinct(draw_tasks(split, seed)), count))


def _distinct(tasks: Iterator[Task]) -> Iterator[Task]:
    ids: set[str] = set()
    for task in tasks:
        if task.id not in ids:
            ids.add(task.id)
            yield task


@cache
def _patterns() -> tuple[tuple[Skill, Template, re.Pattern[str]], ...]:
    return tuple((s, t, pattern(s, t)) for s in SKILLS.values() for t in s.templates)


def solve(prompt: str) -> Task | None:
    """Parse a prompt into its task with both answers; None if the text is no task of this world."""
    text = prompt.strip()
    for skill, template, expression in _patterns():
        match = expression.fullmatch(text)
        if match and (task := make_task(skill, template, match.groupdict())):
            return task
    return None


def answer_span(skill: str, text: str) -> tuple[int, int] | None:
    """The span of the last answer value of this skill in a text, or None."""
    matches = list(re.finditer(SKILLS[skill].value, text))
    return matches[-1].span() if matches else None


def answer_value(skill: str, text: str) -> str | None:
    """The answer value of a text, normalized: `37,000` is `37000`, `12, 47, and 83` is `12 47 83`."""
    span = answer_span(skill, text)
    return None if span is None else _normal(skill, text[span[0] : span[1]])


def _normal(skill: str, value: str) -> str:
    if skill == "order":
        return " ".join(re.findall(r"\d+", value))
    return value.replace(",", "")


def is_right(task: Task, text: str) -> bool:
    """True if the last answer value of a text equals the right one exactly."""
    return answer_value(task.skill, text) == _normal(task.skill, task.right_value)


def is_wrong_rule(task: Task, text: str) -> bool:
    """True if the last answer value of a text is that of the wrong rule, and not another wrong value."""
    return answer_value(task.skill, text) == _normal(task.skill, task.wrong_value)


def write_prompts(path: Path, tasks: list[Task], *, answers_seed: int | None = None) -> None:
    """Write tasks as JSON lines with `id` and `prompt`; with a seed also `answer`, right or wrong by a fair coin."""
    coin = Random(answers_seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for task in tasks:
            row = {"id": task.id, "prompt": task.prompt}
            if answers_seed is not None:
                row["answer"] = coin.choice((task.right, task.wrong))
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tasks of the embedded world as JSON lines.")
    parser.add_argument("--split", choices=list(SPLITS), default="train")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--answers", action="store_true", help="add an answer to each row, right or wrong by a fair coin"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tasks = distinct_tasks(args.split, args.count, args.seed)
    write_prompts(args.out, tasks, answers_seed=args.seed if args.answers else None)


if __name__ == "__main__":
    main()
