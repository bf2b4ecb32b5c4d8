"""The rule parser: what each rule says by hand, and the published numbers."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from apo.evaluation.mixeval.benchmark import load
from apo.evaluation.mixeval.rules import chosen_letter, is_right

OPTIONS = ("ice", "fire", "the sun")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'B'!", "B"),
        ("B\nbecause", "B"),
        ("I say\nB\nand more", "B"),
        ("It is B. Sure", "B"),
        ("It is B.\nSure", "B"),
        ("I say\nB. fire", "B"),
        ("I say\nB.\n", "B"),
        ("(C)ertainly", "C"),
        ("**C is it", "C"),
        ("The answer: C**", "C"),
        ("**A. ice", "A"),
        ("so C.**", "C"),
        ("not A but C", "A"),
        ("D", None),
        ("b", None),
        ("Bingo", None),
        ("", None),
        ("fire", None),  # five words or fewer
        ("I would say that FIRE is hot", "B"),
        ("The Sun and fire and ice are things", "C"),
        ("I really have no idea at all", None),
    ],
)
def test_the_letter_of_a_response_by_hand(response, letter):
    assert chosen_letter(response, OPTIONS) == letter


def test_an_empty_option_is_in_no_response():
    assert chosen_letter("I really have no idea at all", ("", "x")) is None


@pytest.mark.parametrize(
    ("response", "answers", "right"),
    [
        ("Goethe", ["Goethe"], True),
        ("It was GOETHE.", ["goethe"], True),
        ("Schiller", ["Goethe", "schiller"], True),
        ("The capital is Paris, not Rome", ["paris"], True),
        ("Paris is the capital", ["Paris"], False),  # only what follows the cue counts
        ("Paris is the capital.\nThe answer is Paris", ["Paris"], True),
        ("x = 4", ["4"], True),
        ("2 + 2 = 5", ["2"], False),
        ("2 + 2 = 5\nright", ["2"], True),  # = is a cue in the last line only, and without any cue all counts
        ("The result is 1,234.50 dollars", ["1234.5"], True),
        ("It is 3.14159", ["3.14"], True),
        ("It is 12", ["2"], False),  # numbers are compared as numbers
        ("It is 1.5e3 m", ["1500"], True),
        ("The answer is xy", ["x"], False),  # one character needs a space beside it
        ("The answer is x y", ["x"], True),
        ("The answer is x", ["x"], True),
        ("anything", [""], False),
        ("anything", ["", "  ", "thing"], True),
        ("", ["a"], False),
        ("It is nan", ["nan"], True),
        ("It is infinity", ["inf"], True),  # as text
    ],
)
def test_free_form_answers_by_hand(response, answers, right):
    assert is_right(response, answers) is right


@pytest.mark.parametrize(
    ("response", "answer", "ours", "faithful"),
    [
        ("It weighs 5kg", "5", True, False),
        ("It came 10th", "10", True, False),
        ("It is 1,234.50 dollars", "1234.5", True, False),
        ("It is 1,234.50 dollars", "234.5", False, True),
        ("It is 1,234.50 dollars", "1234", False, True),
        ("It is 1,234 dollars", "1234", True, True),
        ("It is -3.5 degrees", "-3.5", True, True),
        ("It is .5 m", "0.5", True, True),
        ("It is 2e3 m", "2000", True, True),
        ("It is 12 m", "2", False, False),
        ("It was 3, then 4", "3", True, False),  # no number before a comma
    ],
)
def test_numbers_are_found_as_the_benchmark_does_where_faithful(response, answer, ours, faithful):
    assert (is_right(response, [answer]), is_right(response, [answer], faithful=True)) == (ours, faithful)


def test_a_response_of_digits_is_read_in_linear_time():
    for text in ("1" * 300_000 + "k", "1," * 100_000, "-" * 300_000, "1" * 300_000 + "e"):
        for faithful in (False, True):
            assert not is_right(text, ["7"], faithful=faithful)


FREE_FORM = {"AGIEval": 0, "BBH": 2, "DROP": 58, "GSM8k": 4, "MATH": 0, "TriviaQA": 38}
MULTIPLE_CHOICE = {
    "AGIEval": 16, "ARC": 0, "BoolQ": 22, "CommonsenseQA": 18, "GPQA": 0, "HellaSwag": 12, "MBPP": 2, "MMLU": 80,
    "OpenBookQA": 4, "PIQA": 5, "SIQA": 7,
}  # fmt: skip


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize(("split", "expected"), [("free-form", FREE_FORM), ("multiple-choice", MULTIPLE_CHOICE)])
def test_right_answers_of_the_published_gemma_by_benchmark(real, split, expected, faithful):
    rows = load(real, "2024-06-01").rows[split]
    right, without = Counter(), 0
    for line in (real / f"responses/gemma-1.1-7b-it/{split}.jsonl").read_text("utf-8").splitlines():
        answer = json.loads(line)
        row = rows[int(answer["id"])]
        if split == "free-form":
            right[row.benchmark] += is_right(answer["response"], row.target, faithful=faithful)
        else:
            letter = chosen_letter(answer["response"], row.options)
            right[row.benchmark] += letter in row.right
            without += letter is None
    assert right == expected
    assert without == (0 if split == "free-form" else 47)
