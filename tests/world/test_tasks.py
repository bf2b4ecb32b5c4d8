"""The world's tasks: disjoint splits, prompts that can be solved, answers that can be distinguished."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from random import Random

import pytest

from recipes.world.skills import SKILLS
from recipes.world.tasks import (
    SPLITS,
    answer_value,
    distinct_tasks,
    draw_tasks,
    is_right,
    is_wrong_rule,
    make_task,
    solve,
    write_prompts,
)

TASK_COUNT = 1200
TASKS = {split: list(islice(draw_tasks(split, seed=1), TASK_COUNT)) for split in SPLITS}


def test_no_content_lies_in_two_splits() -> None:
    contents = {split: {(task.skill, task.content) for task in tasks} for split, tasks in TASKS.items()}
    print({split: len(texts) for split, texts in contents.items()}, "contents looked at")
    for split, texts in contents.items():
        assert len(texts) > 700
        assert all(task.split == split for task in TASKS[split])
        assert not any(texts & others for name, others in contents.items() if name != split)


def test_rephrasing_a_task_leaves_it_in_its_split() -> None:
    rng = Random(0)
    count = 0
    for skill in SKILLS.values():
        for _ in range(50):
            slots = skill.draw(rng)
            phrased = [task for template in skill.templates if (task := make_task(skill, template, slots))]
            assert len({task.split for task in phrased}) <= 1
            count += len(phrased)
    print(f"{count} phrasings looked at")
    assert count > 1000


def test_the_order_of_the_numbers_does_not_change_the_split() -> None:
    for first, second in (
        ("What is 17 plus 38?", "Please add 38 to 17 for me."),
        ("Sort 49, 27 and 64 from smallest to largest.", "Put the numbers 64, 49, 27 in ascending order."),
    ):
        assert solve(first).content == solve(second).content


@pytest.mark.parametrize("skill", SKILLS)
def test_solve_inverts_every_template(skill: str) -> None:
    tasks = [task for task in TASKS["train"] if task.skill == skill]
    counts = Counter(task.template for task in tasks)
    assert len(counts) == len(SKILLS[skill].templates) >= 8
    assert min(counts.values()) >= 20
    assert all(solve(f"\n{task.prompt} ") == task for task in tasks)


def test_solve_gives_none_for_what_is_no_task() -> None:
    foreign = [
        "",
        "Hello",
        "What is 11 plus 12?",
        "What is 17 plus 380?",
        "What is 90 plus 99?",
        "How many cents are 3 tonnes?",
    ]
    assert [solve(text) for text in foreign] == [None] * len(foreign)


def test_right_and_wrong_differ_in_the_value_alone_and_are_distinguished() -> None:
    tasks = [task for tasks in TASKS.values() for task in tasks]
    for task in tasks:
        assert is_right(task, task.right)
        assert not is_right(task, task.wrong)
        assert is_wrong_rule(task, task.wrong)
        assert not is_wrong_rule(task, task.right)
        assert task.right.replace(task.right_value, "?") == task.wrong.replace(task.wrong_value, "?")
        assert 8 <= len(task.right.split()) <= 25
    print(f"{len(tasks)} tasks looked at")


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        ("What is 47 plus 35?", "82", "72"),
        ("Sort 49, 27 and 64 from smallest to largest.", "27, 49 and 64", "64, 49 and 27"),
        ("Convert 7 metres to centimetres.", "700", "70"),
        ("Codes: figs 14, plums 23, nuts 31, pears 52. Give the code for plums.", "23", "52"),
        ("Edit KTUMA: second letter to B.", "KBUMA", "KTBMA"),
    ],
)
def test_each_skill_has_its_own_mistake(prompt: str, right: str, wrong: str) -> None:
    task = solve(prompt)
    assert (task.right_value, task.wrong_value) == (right, wrong)


@pytest.mark.parametrize(
    ("skill", "text", "value"),
    [
        ("convert", "That makes 37,000 metres.", "37000"),
        ("sums", "It is 72. No, it is 82!", "82"),
        ("order", "They are 12, 47, and 83.", "12 47 83"),
        ("edit", "The code is KBUMA", "KBUMA"),
        ("sums", "I do not know.", None),
    ],
)
def test_the_last_value_of_a_text_is_its_answer(skill: str, text: str, value: str | None) -> None:
    assert answer_value(skill, text) == value


def test_the_same_seed_draws_the_same_tasks_and_another_seed_others() -> None:
    assert distinct_tasks("train", 50, 0) == distinct_tasks("train", 50, 0)
    assert distinct_tasks("train", 50, 0) != distinct_tasks("train", 50, 1)
    assert len({task.prompt for task in distinct_tasks("heldout", 600, 0)}) == 600


def test_skills_and_templates_come_in_equal_numbers() -> None:
    assert set(Counter(task.skill for task in TASKS["train"]).values()) == {TASK_COUNT // 5}
    assert set(Counter(task.template for task in TASKS["train"]).values()) == {TASK_COUNT // 40}


def test_an_unknown_split_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; one of: pretrain, train"):
        next(draw_tasks("test", 0))


def test_prompt_files_hold_id_prompt_and_on_request_an_answer_by_a_fair_coin(tmp_path) -> None:
    tasks = TASKS["train"][:400]
    write_prompts(tmp_path / "bare.jsonl", tasks)
    write_prompts(tmp_path / "answered.jsonl", tasks, answers_seed=0)
    bare, answered = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("bare", "answered")
    )
    assert [row["prompt"] for row in bare] == [task.prompt for task in tasks]
    assert set(bare[0]) == {"id", "prompt"}
    right = sum(is_right(task, row["answer"]) for task, row in zip(tasks, answered, strict=True))
    assert 160 <= right <= 240
