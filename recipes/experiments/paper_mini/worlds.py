"""Make the worlds of the designs: a target that is wrong by regions, its prompts, its questions, and its pairs.

A world is one draw of everything: the regions in which the target is wrong, its training, the skill and the phrasings
without pairs, the prompts, the samples, the writers' regions, the judge's errors and the order of the pairs. The target
of a world named `quickstart-N` is the quickstart's model, which is right at random.

    RUN/worlds/NAME/target       the target
    RUN/worlds/NAME/SET          pairs to train on (train) and held out (test), one folder for each of `sets_of`
    RUN/worlds/NAME/world.json   the measurements of the world and its gates
    RUN/worlds/NAME/delta        the pairs of D4, made by `delta` when they are needed
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from clair.core.files import read_json, write_json
from recipes.world.judge import compare_solutions
from recipes.world.reviser import corrected
from recipes.world.skills import SKILLS
from recipes.world.skills.skill import Values, pattern
from recipes.world.style import PRAISE, PREFIXES, STYLES, SUFFIXES, add_style, remove_style
from recipes.world.tasks import Task, draw_tasks, is_right

TEMPLATES = tuple(template.id for skill in SKILLS.values() for template in skill.templates)
QUESTIONS_PER_TEMPLATE = 15
TRAIN_PAIRS, TEST_PAIRS = 160, 60
SKILLS_TRAINED, TEMPLATES_TRAINED = 4, 6
"""The number of skills with pairs, and of phrasings of each with pairs: 24 of 40 templates."""
TARGET_RIGHT = 0.70
TARGET_WORDING = (0.05, 0.90, 0.05)
TARGET_STEPS, TARGET_BATCH, TARGET_PEAK = 300, 64, 3e-3
WRITERS: Mapping[str, tuple[float, float]] = {"weak": (0.40, 0.25), "strong": (0.95, 0.80)}
"""The shares of regions in which the two writers of a judged set are right, by regime."""
WRITERS_WORDING = (0.3, 0.4, 0.3)
JUDGE_ERROR = 0.05
DOSES = ("clair", "dose-1", "dose-2", "dose-3")
"""Correction alone; then also a new opening; also a new closing; also another sentence."""
CONTRASTED = ("clair", "delta")
"""The two sets of D4."""
MIN_SAMPLE_NATS, MIN_WELL_FORMED, MIN_REGIONAL, MAX_RIGHT_DEVIATION = -2.0, 0.98, 0.90, 0.08
"""Gates of a target: the log-likelihood of its own samples in nats, the share of well-formed samples, the share of
greedy answers that agree with their region, and the deviation of its accuracy from `TARGET_RIGHT`."""

Region = tuple[str, bool]
Sides = tuple[str, str]
"""The chosen and the rejected answer."""


@dataclass(frozen=True)
class World:
    """One draw, with a name such as `regions-7` or `quickstart-0`."""

    target: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.target}-{self.seed}"


def world_of(name: str) -> World:
    """Return the world with this name."""
    target, _, seed = name.rpartition("-")
    return World(target, int(seed))


# ---- regions, templates and questions


def is_low(task: Task) -> bool:
    """Return True if the task's operand lies in the lower half of its range."""
    numbers = [int(number) for number in re.findall(r"\d+", task.content)]
    match task.skill:
        case "sums" | "order":
            return numbers[0] < 25  # the smaller or smallest of the numbers
        case "convert":
            return numbers[0] < 50
        case "lookup":
            return int(task.wrong_value) < 50  # the last row of the table
        case _:
            return "/first/" in task.content or "/second/" in task.content


def region(task: Task) -> Region:
    """Return the region of a task: its phrasing, and whether its operand is low."""
    return task.template, is_low(task)


def difficulties(seed: int, name: str) -> dict[Region, float]:
    """Return a number in (0, 1) for each region, evenly spread within each skill.

    A model that is right in a share r of the regions is right in those below r.
    """
    rng, result = Random(f"{name}-{seed}"), {}
    for skill in SKILLS.values():
        regions = [(template.id, low) for template in skill.templates for low in (True, False)]
        rng.shuffle(regions)
        result |= {item: (index + 0.5) / len(regions) for index, item in enumerate(regions)}
    return result


def trained_templates(seed: int) -> frozenset[str]:
    """Return the templates of a world's pairs. Each world leaves out the next skill in turn."""
    rng, skills = Random(f"templates-{seed}"), list(SKILLS.values())
    del skills[seed % len(skills)]
    return frozenset(t.id for skill in skills for t in rng.sample(skill.templates, TEMPLATES_TRAINED))


def stratum(template: str, seed: int) -> str:
    """Return `trained`, `new phrasing` (of a trained skill), or `new skill`."""
    trained = trained_templates(seed)
    if template in trained:
        return "trained"
    skill = template.rpartition("-")[0]
    return "new phrasing" if any(t.startswith(f"{skill}-") for t in trained) else "new skill"


def _distinct(tasks: Iterable[Task]) -> Iterator[Task]:
    prompts: set[str] = set()
    for task in tasks:
        if task.id not in prompts:
            prompts.add(task.id)
            yield task


def questions(world: World, split: str = "heldout") -> list[Task]:
    """Return the questions of a world: `QUESTIONS_PER_TEMPLATE` of each template, in the order of `TEMPLATES`."""
    groups: dict[str, list[Task]] = {template: [] for template in TEMPLATES}
    for task in _distinct(draw_tasks(split, world.seed)):
        if len(groups[task.template]) < QUESTIONS_PER_TEMPLATE:
            groups[task.template].append(task)
            if all(len(group) == QUESTIONS_PER_TEMPLATE for group in groups.values()):
                break
    return [task for template in TEMPLATES for task in groups[template]]


def prompts(world: World) -> Iterator[Task]:
    """Yield distinct tasks of the trained templates for pairs, without end."""
    trained = trained_templates(world.seed)
    return _distinct(task for task in draw_tasks("train", 5000 + world.seed) if task.template in trained)


def is_well_formed(task: Task, text: str) -> bool:
    """Return True if the text, without its style, is this template's answer with any value."""
    skill = SKILLS[task.skill]
    template = next(template for template in skill.templates if template.id == task.template)
    values = _values(task)
    prefix, suffix = (re.escape(side.format_map(values)) for side in template.answer.partition("{value}")[::2])
    return bool(re.fullmatch(f"{prefix}(?:{skill.value}){suffix}", remove_style(text)))


def _values(task: Task) -> Values:
    skill = SKILLS[task.skill]
    template = next(template for template in skill.templates if template.id == task.template)
    match = pattern(skill, template).fullmatch(task.prompt)
    assert match
    return match.groupdict()


# ---- the target


def answered_by_region(seed: int) -> Iterator[tuple[Task, str]]:
    """Yield pretraining tasks with the target's answers, without end: right or wrong by region, mostly plain."""
    coin, difficulty = Random(f"wording-{seed}"), difficulties(seed, "target")
    for task in draw_tasks("pretrain", 1000 + seed):
        sentence = task.right if difficulty[region(task)] < TARGET_RIGHT else task.wrong
        yield task, add_style(sentence, coin.choices(STYLES, TARGET_WORDING)[0], coin)


def make_target(world: World, folder: Path) -> None:
    """Fine-tune the quickstart's model to be the world's target."""
    import torch

    from recipes.experiments.paper_mini.models import BASE, save_atomically
    from recipes.world.evaluate import load
    from recipes.world.make_model import PAD, encode, pretrain, token_id

    torch.manual_seed(world.seed)
    model, tokenizer = load(BASE)
    source = answered_by_region(world.seed)
    batches = (encode(tokenizer, list(islice(source, TARGET_BATCH))) for _ in range(TARGET_STEPS))
    pretrain(model, batches, pad=token_id(tokenizer, PAD), steps=TARGET_STEPS, peak=TARGET_PEAK)
    save_atomically(model, tokenizer, folder, {"world": world.name, "steps": TARGET_STEPS, "peak": TARGET_PEAK})


# ---- pairs


def rephrased(task: Task, rng: Random) -> str:
    """Return the right answer to a task, in the sentence of another phrasing of its skill."""
    values = {**_values(task), "value": task.right_value}
    sentences = []
    for template in SKILLS[task.skill].templates:
        if template.id != task.template and set(re.findall(r"\{(\w+)\}", template.answer)) <= values.keys():
            sentences.append(template.answer.format_map(values))
    return rng.choice(sentences)


def rewritten(task: Task, answer: str, dose: int, rng: Random) -> str:
    """Return a wrong answer corrected; `dose` also rewrites its opening (1), closing (2) and sentence (3)."""
    revision = corrected(task, answer)
    if dose == 0:
        return revision
    sentence = rephrased(task, rng) if dose == 3 else remove_style(revision)
    opening, closing = rng.choice((PRAISE, *PREFIXES)), rng.choice(SUFFIXES)
    return opening + sentence + (closing if dose >= 2 else "")


def revised_sides(task: Task, answer: str, dose: int, rng: Random) -> Sides | None:
    """Return CLAIR's pair of the revision and the target's wrong answer; None if the answer is right."""
    return None if is_right(task, answer) else (rewritten(task, answer, dose, rng), answer)


def judged_sides(task: Task, difficulty: Mapping[Region, float], writers: Sequence[float], rng: Random) -> Sides | None:
    """Return the answers of two writers, the one that the judge prefers first; None for a tie."""
    texts = [
        add_style(
            task.right if difficulty[region(task)] < right else task.wrong,
            rng.choices(STYLES, WRITERS_WORDING)[0],
            rng,
        )
        for right in writers
    ]
    _, better = compare_solutions(task.prompt, *texts, style=True)
    if better == 0:
        return None
    if rng.random() < JUDGE_ERROR:
        better = 3 - better
    return texts[better - 1], texts[2 - better]


def sets_of(world: World) -> tuple[str, ...]:
    """Return the names of a world's sets of pairs."""
    return ("clair",) if world.target == "quickstart" else (*DOSES, *WRITERS)


def _sides_of(world: World, name: str) -> Callable[[Task, str], Sides | None]:
    rng = Random(f"{name}-{world.seed}")
    if name in WRITERS:
        difficulty = difficulties(world.seed, "writers")
        return lambda task, _: judged_sides(task, difficulty, WRITERS[name], rng)
    return lambda task, answer: revised_sides(task, answer, DOSES.index(name), rng)


def build_pairs(world: World, answered: Sequence[tuple[Task, str]], name: str, folder: Path) -> dict[str, Any]:
    """Write one set of pairs from prompts with the target's samples. Returns its measurements."""
    from clair.data.contrast import contrast_of
    from clair.data.dataset import DatasetWriter, assign_split, split_file
    from clair.data.records import Pair

    sides_of, limits = _sides_of(world, name), {"train": TRAIN_PAIRS, "test": TEST_PAIRS}
    writer = DatasetWriter(folder, seed=world.seed, test_fraction=TEST_PAIRS / (TRAIN_PAIRS + TEST_PAIRS))
    pairs: list[tuple[Task, Sides]] = []
    for task, answer in answered:
        sides, split = sides_of(task, answer), assign_split(task.id, writer.seed, writer.test_fraction)
        if sides is None or writer.counts[split] == limits[split]:
            continue
        contrast = contrast_of(*sides)._asdict()
        row = Pair(task.id, [{"role": "user", "content": task.prompt}], *sides, "", {}, contrast).row()
        writer.add(row)
        pairs.append((task, sides))
    counts, contrast = dict(writer.counts), writer.contrast_means()
    hashes = writer.close(keep=True)
    winners, losers = (sum(is_right(t, s[side]) for t, s in pairs) / len(pairs) for side in (0, 1))
    measured = {
        "winners_right": round(winners, 4),
        "losers_right": round(losers, 4),
        "sha256": hashes[split_file("train")],
    }
    return {
        **counts,
        **measured,
        "contrast": {k: round(v, 4) for k, v in contrast.items() if k in ("jaccard", "levenshtein")},
    }


# ---- the world and its gates


def sample_nats(folder: Path, answered: Sequence[tuple[Task, str]]) -> float:
    """Return the mean log-likelihood of answers under a model, in nats per answer, including the end of turn."""
    import torch

    from recipes.world.evaluate import load
    from recipes.world.make_model import PAD, answer_loss, encode, token_id

    model, tokenizer = load(folder)
    examples, total = encode(tokenizer, list(answered)), 0.0
    with torch.no_grad():
        for start in range(0, len(examples), 100):
            batch = examples[start : start + 100]
            tokens = sum(len(ids) - first for ids, first in batch)
            total -= answer_loss(model, batch, token_id(tokenizer, PAD)).item() * tokens
    return total / len(examples)


def gates_of(measured: Mapping[str, Any], target: str) -> dict[str, bool]:
    """Return the gates of a world by name. Gates about regions do not apply to the quickstart's model."""
    sets = measured["sets"].values()
    gates = {
        "samples above -2 nats": measured["nats"] > MIN_SAMPLE_NATS,
        "98 % well formed": measured["well_formed"] >= MIN_WELL_FORMED,
        "all pairs": all(s.get("train") == TRAIN_PAIRS and s.get("test") == TEST_PAIRS for s in sets),
    }
    if target == "regions":
        gates["wrong by regions"] = measured["regional"] >= MIN_REGIONAL
        gates["right as designed"] = abs(measured["right"] - TARGET_RIGHT) <= MAX_RIGHT_DEVIATION
    return gates


def make_world(name: str, run: Path) -> dict[str, Any]:
    """Make a world, or read it if it exists. Returns its measurements and gates."""
    from recipes.experiments.paper_mini.answers import MAX_NEW_TOKENS, answers
    from recipes.experiments.paper_mini.models import BASE

    world, folder = world_of(name), run / "worlds" / name
    if (folder / "world.json").exists():
        return read_json(folder / "world.json")
    target = BASE if world.target == "quickstart" else folder / "target"
    if target != BASE:
        make_target(world, target)
    share_wrong = 0.5 if target == BASE else 1 - TARGET_RIGHT
    needed = round((TRAIN_PAIRS + TEST_PAIRS) / share_wrong * 1.7)
    tasks = list(islice(prompts(world), needed))
    answered = list(zip(tasks, answers(target, tasks, temperature=1.0, seed=world.seed), strict=True))
    heldout = questions(world)
    greedy, difficulty = answers(target, heldout), difficulties(world.seed, "target")
    right = [is_right(task, text) for task, text in zip(heldout, greedy, strict=True)]
    measured: dict[str, Any] = {
        "nats": round(sample_nats(target, answered), 4),
        "well_formed": round(sum(is_well_formed(*item) for item in answered) / len(answered), 4),
        "right": round(sum(right) / len(right), 4),
        "regional": round(
            sum(r == (difficulty[region(t)] < TARGET_RIGHT) for r, t in zip(right, heldout, strict=True)) / len(right),
            4,
        ),
        "sets": {item: build_pairs(world, answered, item, folder / item) for item in sets_of(world)},
        "prompts": needed,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    measured["gates"] = gates_of(measured, world.target)
    write_json(folder / "world.json", measured)
    return measured
