"""The worlds of the designs: wrong by regions, pairs about a part of them, revisions of the value alone, and gates."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import pytest

from clair.core.errors import UserError
from clair.data.contrast import contrast_of
from clair.data.dataset import read_rows
from recipes.experiments.paper_mini.delta import build_delta, delta_sides
from recipes.experiments.paper_mini.design import Run
from recipes.experiments.paper_mini.run import train_run
from recipes.experiments.paper_mini.worlds import (
    DOSES,
    TARGET_RIGHT,
    TEMPLATES,
    TEST_PAIRS,
    TRAIN_PAIRS,
    WRITERS,
    answered_by_region,
    build_pairs,
    difficulties,
    gates_of,
    is_well_formed,
    judged_sides,
    make_world,
    prompts,
    questions,
    region,
    revised_sides,
    sets_of,
    stratum,
    trained_templates,
    world_of,
)
from recipes.world.style import add_style, remove_style
from recipes.world.tasks import answer_value, is_right

WORLD = world_of("regions-3")
TASKS = list(islice(prompts(WORLD), 400))


def test_a_world_is_named_by_its_target_and_seed():
    assert (WORLD.target, WORLD.seed, WORLD.name) == ("regions", 3, "regions-3")
    assert sets_of(world_of("quickstart-0")) == ("clair",)


def test_the_target_is_right_in_eleven_of_sixteen_regions_of_each_skill_and_always_there():
    difficulty = difficulties(3, "target")
    right = {item for item, value in difficulty.items() if value < TARGET_RIGHT}
    assert Counter(template.rpartition("-")[0] for template, _ in right) == dict.fromkeys(
        ("sums", "order", "convert", "lookup", "edit"), 11
    )
    for task, text in islice(answered_by_region(3), 500):
        assert task.split == "pretrain"
        assert is_right(task, text) == (region(task) in right)
    assert difficulties(4, "target") != difficulty != difficulties(3, "writers")


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_about_24_of_40_templates_and_4_of_5_skills(seed):
    strata = Counter(stratum(template, seed) for template in TEMPLATES)
    assert strata == {"trained": 24, "new phrasing": 8, "new skill": 8}
    skills = {template.rpartition("-")[0] for template in trained_templates(seed)}
    assert len(skills) == 4
    assert {t.rpartition("-")[0] for t in trained_templates(seed + 1)} != skills


@pytest.mark.parametrize("split", ["heldout", "validation"])
def test_questions_are_fifteen_distinct_ones_of_each_template_and_never_prompts_of_pairs(split):
    tasks = questions(WORLD, split)
    assert Counter(task.template for task in tasks) == dict.fromkeys(TEMPLATES, 15)
    assert [task.template for task in tasks[::15]] == list(TEMPLATES)
    assert len({task.id for task in tasks}) == 600
    assert {task.split for task in tasks} == {split}
    assert {task.template for task in TASKS} == trained_templates(WORLD.seed)
    assert {task.split for task in TASKS} == {"train"}


def test_the_reviser_replaces_a_wrong_value_and_nothing_else():
    rng = Random(0)
    for task in TASKS[:60]:
        student = add_style(task.wrong, rng.choice(["plain", "padded"]), rng)
        sides = revised_sides(task, student, 0, rng)
        assert sides == (student.replace(task.wrong_value, task.right_value), student)
        assert revised_sides(task, task.right, 0, rng) is None


def test_doses_change_more_and_more_and_never_the_value():
    rng, contrast = Random(0), {}
    for dose in range(len(DOSES)):
        pairs = [revised_sides(task, task.wrong, dose, rng) for task in TASKS]
        assert all(sides and is_right(task, sides[0]) for task, sides in zip(TASKS, pairs, strict=True))
        contrast[dose] = sum(contrast_of(*sides).jaccard or 0 for sides in pairs if sides) / len(TASKS)
    assert contrast[0] > contrast[1] > contrast[2] > contrast[3]
    rephrased = [revised_sides(task, task.wrong, 3, rng) for task in TASKS]
    assert not any(remove_style(sides[0]) == task.right for task, sides in zip(TASKS, rephrased, strict=True) if sides)


@pytest.mark.parametrize("regime", WRITERS)
def test_the_better_writer_is_right_wherever_the_other_is_and_the_judge_mostly_sees_it(regime):
    difficulty, rng, kept = difficulties(3, "writers"), Random(0), Counter()
    better, poorer = WRITERS[regime]
    for task in TASKS:
        sides = judged_sides(task, difficulty, (better, poorer), rng)
        level = difficulty[region(task)]
        if sides is None:
            assert level < poorer or level >= better  # only equally right answers tie
            continue
        right = [is_right(task, side) for side in sides]
        assert any(right) == (level < better)
        assert all(right) == (level < poorer)
        kept["pairs"] += 1
        kept["winners right"] += right[0]
        kept["in order"] += right == [True, False]
        kept["reversed"] += right == [False, True]
    assert kept["reversed"] < 0.2 * kept["in order"]
    share = kept["winners right"] / kept["pairs"]
    assert share < 0.6 if regime == "weak" else share > 0.85


def test_an_answer_is_well_formed_by_its_sentence_whatever_the_value():
    task, other = TASKS[0], next(task for task in TASKS if task.skill != TASKS[0].skill)
    assert is_well_formed(task, task.right)
    assert is_well_formed(task, add_style(task.wrong, "padded", Random(0)))
    assert not is_well_formed(task, other.right)
    assert not is_well_formed(task, task.right + task.right)
    value = answer_value(task.skill, task.right)
    assert value
    assert not is_well_formed(task, task.right.replace(task.right_value, ""))


MEASURED = {
    "nats": -0.7,
    "well_formed": 0.99,
    "regional": 0.96,
    "right": 0.68,
    "sets": {"clair": {"train": TRAIN_PAIRS, "test": TEST_PAIRS}},
}


def test_a_good_world_meets_its_gates():
    assert all(gates_of(MEASURED, "regions").values())
    assert len(gates_of(MEASURED, "regions")) == 5
    assert len(gates_of(MEASURED, "quickstart")) == 3


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"nats": -2.0}, "samples above -2 nats"),
        ({"well_formed": 0.979}, "98 % well formed"),
        ({"regional": 0.89}, "wrong by regions"),
        ({"right": 0.79}, "right as designed"),
        ({"right": 0.61}, "right as designed"),
        ({"sets": {"clair": {"train": TRAIN_PAIRS, "test": 59}}}, "all pairs"),
    ],
)
def test_each_gate_closes_alone(change, gate):
    assert [name for name, met in gates_of(MEASURED | change, "regions").items() if not met] == [gate]


def test_a_set_has_the_same_pairs_each_time_and_as_many_as_it_should(tmp_path):
    answered = [(task, task.wrong) for task in TASKS]
    first, second = (build_pairs(WORLD, answered, "clair", tmp_path / name) for name in "ab")
    assert first == second
    assert (first["train"], first["test"]) == (TRAIN_PAIRS, TEST_PAIRS)
    assert (first["winners_right"], first["losers_right"]) == (1.0, 0.0)
    rows = list(read_rows(tmp_path / "a", ["train"]))
    assert len(rows) == TRAIN_PAIRS
    assert build_pairs(WORLD, answered[:20], "clair", tmp_path / "c")["train"] < TRAIN_PAIRS


# ---- delta pairs


def test_the_better_writer_is_chosen_whoever_is_right_and_equal_answers_are_no_pair():
    difficulty, rng = difficulties(3, "writers"), Random(0)
    sides = [(task, delta_sides(task, difficulty, rng)) for task in TASKS]
    right = [(is_right(task, pair[0]), is_right(task, pair[1])) for task, pair in sides if pair]
    assert 0 < len(right) < len(TASKS)
    assert (False, True) not in right
    assert Counter(right).keys() == {(True, True), (True, False), (False, False)}


@pytest.mark.slow
def test_delta_pairs_have_the_tokens_of_the_clair_pairs_and_no_longer_winners(tmp_path):
    world = world_of("regions-903")
    tasks = list(islice(prompts(world), 120))
    build_pairs(world, [(task, task.wrong) for task in tasks], "clair", tmp_path / "worlds/regions-903/clair")
    measured = build_delta("regions-903", tmp_path, candidates=700)
    assert measured["pairs"] % 8 == 0
    assert 0.8 * measured["clair_tokens"] < measured["tokens"] <= measured["clair_tokens"]
    assert measured["longer_before"] > 1 > measured["longer"]
    assert measured["winners_right"] > measured["losers_right"]
    folder = tmp_path / "worlds/regions-903"
    counts = [len(list(read_rows(folder / "delta", [split]))) for split in ("train", "test")]
    assert counts == [measured["pairs"], TEST_PAIRS]
    assert build_delta("regions-903", tmp_path) == measured
    (folder / "delta.json").unlink()
    with pytest.raises(UserError, match="40 prompts give too few delta pairs"):
        build_delta("regions-903", tmp_path, candidates=40)


@pytest.mark.slow
def test_a_delta_set_is_trained_on_as_any_other(tmp_path):
    name = "quickstart-903"
    make_world(name, tmp_path)
    measured = build_delta(name, tmp_path)
    line = train_run(Run(name, "delta", "apo_zero", 5e-5, 0.1, 1, 1), tmp_path)
    assert [checkpoint["epoch"] for checkpoint in line["checkpoints"]] == [0, 1]
    first, last = (checkpoint["pairs"]["logps/rejected"] for checkpoint in line["checkpoints"])
    assert last < first
    assert measured["pairs"] != TRAIN_PAIRS
