"""Comparisons with worker ids: TL;DR summaries and PAL's samples are read as pairs with a user, from every file."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from clair.core.errors import UserError
from clair.data.comparison_rows import as_pair
from clair.data.preference_rows import read_row
from clair.data.preference_sources import load_preferences


def tldr(choice: int, worker: str, **info: str) -> dict:
    """A row in the columns of openai/summarize_from_feedback, `comparisons`."""
    texts = ("a short one", "a much longer summary")
    return {
        "info": {"id": "t3_1", "post": "My cat ran away.", "title": "Cat", "subreddit": "pets", **info},
        "summaries": [{"text": text, "policy": "sup2", "note": "ok"} for text in texts],
        "choice": choice,
        "worker": worker,
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


def pal(y: int | str, user: str) -> dict:
    return {"user_id": user, "prompt": "2 + 2?", "response_1": "4", "response_2": "5", "y": y}


def read(path) -> list[dict]:
    rows = load_preferences(path).dataset
    return [
        {
            side: row[side] if isinstance(row[side], str) else row[side][0]["content"]
            for side in ("prompt", "chosen", "rejected")
        }
        | {"user": str(row["user"])}
        for row in rows
    ]


def write(path, rows):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tldr_comparisons_are_pairs_of_their_workers(tmp_path, kind):
    short, long, post = "a short one", "a much longer summary", "My cat ran away."
    rows = [tldr(0, "w1"), tldr(1, "w2"), tldr(1, "w1", post=None, article="News.")]
    assert read(write(tmp_path / f"c.{kind}", rows)) == [
        {"prompt": post, "chosen": short, "rejected": long, "user": "w1"},
        {"prompt": post, "chosen": long, "rejected": short, "user": "w2"},
        {"prompt": "News.", "chosen": long, "rejected": short, "user": "w1"},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_samples_of_pal_are_pairs_of_their_users(tmp_path, kind):
    assert read(write(tmp_path / f"c.{kind}", [pal(1, "7"), pal(-1, "8")])) == [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "user": "7"},
        {"prompt": "2 + 2?", "chosen": "5", "rejected": "4", "user": "8"},
    ]


def test_rewards_read_the_users_of_comparisons(tmp_path):
    from apo.analysis.features import read_rows

    rows = read_rows([str(write(tmp_path / "c.jsonl", [tldr(0, "w1"), tldr(1, "w2")]))])
    assert [row["user"] for row in rows] == ["w1", "w2"]
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "a much longer summary"}]


def test_persona_evaluations_are_pairs_of_their_answers():
    row = {"question": "Would you say this?", "statement": "I am kind.", "label_confidence": 0.9}
    answers = {"answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    pair = read_row({**row, **answers, "user": "kind"})[0]
    assert [pair[side][0]["content"] for side in ("prompt", "chosen", "rejected")] == [
        "Would you say this?",
        " Yes",
        " No",
    ]
    assert pair["user"] == "kind"


REFUSED = {
    "choice": (tldr(2, "w"), "'choice' is 2; allowed: 0 and 1"),
    "summaries": ({**tldr(0, "w"), "summaries": [{"text": "one"}]}, "'summaries' holds 1 texts"),
    "info": ({**tldr(0, "w"), "info": "text"}, "'info' is str"),
    "y": (pal(0, "u"), "'y' is 0; allowed: 1 and -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_comparison_without_a_choice_of_two_is_refused_with_its_row(tmp_path, case):
    row, message = REFUSED[case]
    good = tldr(0, "w") if "info" in row else pal(1, "u")
    for kind in ("jsonl", "parquet"):
        if kind == "parquet" and case == "info":
            continue  # a column of Parquet has one type
        with pytest.raises(UserError) as error:
            load_preferences(write(tmp_path / f"c.{kind}", [good, row]))
        assert "row 1" in str(error.value)
        assert message in str(error.value)


def test_a_row_of_any_other_form_is_left_alone():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "summaries": [], "info": {}, "choice": 1}
    assert as_pair(row) == row
