"""Wording beside correctness: the styles of answers, and their effect on reviser and judge."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from recipes.experiments.paper_mini.models import SPREAD, Habits, answered
from recipes.world.judge import Leanings, judge
from recipes.world.reviser import Misbehaviour, corrected, plan_reply, read_request, revise
from recipes.world.style import PREFIXES, STYLES, SUFFIXES, add_style, improve_style, remove_style, style_of
from recipes.world.tasks import distinct_tasks, is_right

TASKS = distinct_tasks("train", 40, seed=3)
PLAIN = replace(plan_reply(0, "x", Misbehaviour()), style=0)


@pytest.mark.parametrize("style", STYLES)
def test_a_styled_sentence_is_recognised_and_restored(style):
    for task in TASKS:
        text = add_style(task.right, style, Random(task.id))
        assert style_of(text) == style
        assert remove_style(text) == task.right
        assert is_right(task, text)  # wording says nothing about the value
        assert style_of(improve_style(text)) == "engaging"
        assert improve_style(improve_style(text)) == improve_style(text)


@pytest.mark.parametrize("spoilt", [PREFIXES[0], PREFIXES[1], ""])
def test_one_needless_sentence_is_padding(spoilt):
    assert style_of(f"Good question! {spoilt}It is 5.{'' if spoilt else SUFFIXES[0]}") == "padded"


def revision(task, student, **options):
    message = f"<task>\n{task.prompt}\n</task>\n<student_solution>\n{student}\n</student_solution>"
    assert read_request(message) is not None
    return revise([message], PLAIN, **options).text.rpartition(": ")[2]


def test_the_reviser_polishes_and_overlooks_only_when_it_is_set_to():
    task = TASKS[0]
    student = add_style(task.wrong, "padded", Random(0))
    assert revision(task, student) == corrected(task, student)
    assert revision(task, student, polish=True) == "Good question! " + task.right
    assert revision(task, student, polish=True, mistaken=True) == "Good question! " + task.wrong


def verdicts(first, second, leanings, count=200):
    """The counts of the judge's verdicts on two answers to the first task."""
    task = TASKS[0]
    messages = (
        f"<task>\n{task.prompt}\n</task>\n<student_solution_1>\n{first}\n</student_solution_1>\n"
        f"<student_solution_2>\n{second}\n</student_solution_2>"
    )
    replies = (judge([messages], PLAIN, seed=0, body=str(n), leanings=leanings).text for n in range(count))
    return Counter(text.rpartition("[")[2].rstrip("]") for text in replies)


def test_the_judge_weighs_right_before_wording_and_wording_only_when_asked():
    task = TASKS[0]
    right, wrong = add_style(task.right, "padded", Random(0)), add_style(task.wrong, "engaging", Random(0))
    clear = add_style(task.right, "engaging", Random(0))
    assert verdicts(right, wrong, Leanings(style=True)) == {"1": 200}
    assert verdicts(right, clear, Leanings(style=True)) == {"2": 200}
    assert verdicts(right, clear, Leanings()) == {"tie": 200}


def test_errors_and_biases_come_at_their_rates():
    task = TASKS[0]
    right, wrong = task.right, add_style(task.wrong, "padded", Random(0))
    assert 25 < verdicts(right, wrong, Leanings(judge_error=0.2))["2"] < 55
    assert 25 < verdicts(right, wrong, Leanings(length_bias=0.2))["2"] < 55
    assert 25 < verdicts(wrong, right, Leanings(position_bias=0.2))["1"] < 55
    assert verdicts(right, wrong, Leanings(length_bias=1.0)) == {"2": 200}


TARGETS = {
    "weak": Habits(right=0.30, wording=(0.10, 0.60, 0.30), steps=100, seed=11),
    "strong": Habits(right=0.88, wording=(0.50, 0.40, 0.10), steps=100, seed=15),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_model_is_taught_the_mix_that_its_habits_say(name):
    habits, wordings, right, counts = TARGETS[name], Counter(), Counter(), Counter()
    source = answered(habits)
    for _ in range(1500):
        task, text = next(source)
        assert task.split == "pretrain"
        wordings[style_of(text)] += 1
        right[task.skill] += is_right(task, text)
        counts[task.skill] += 1
    for style, share in zip(STYLES, habits.wording, strict=True):
        assert abs(wordings[style] / 1500 - share) < 0.05
    for skill in SPREAD:
        assert 0 < habits.right_in(skill) < 1
        assert abs(right[skill] / counts[skill] - habits.right_in(skill)) < 0.1
