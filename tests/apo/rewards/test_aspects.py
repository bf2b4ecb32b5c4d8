"""Users who each care for one aspect, from tiny files in UltraFeedback's format."""

from __future__ import annotations

import json

import pytest

from clair.core.errors import UserError
from recipes.experiments.vpl.aspects import ASPECTS, controversial_pairs, rating, write_users
from tests.apo.conftest import write_jsonl


def completion(text: str, *ratings: object) -> dict:
    """A completion as UltraFeedback has it, with a rating, a text, for each of `ASPECTS`."""
    annotations = {
        aspect: {"Rating": value, "Rationale": "because"} for aspect, value in zip(ASPECTS, ratings, strict=True)
    }
    return {"model": "m", "response": text, "annotations": annotations, "overall_score": 5.0}


def row(number: int) -> dict:
    """A row with one controversial pair: `a` is more helpful, `b` more honest, equal in the others; c is not rated."""
    completions = [
        completion("a", "5", "1", "3", "3"),
        completion("b", "2", "4", "3", "3"),
        completion("c", "N/A", "5", "1", "2"),
    ]
    return {"source": "tiny", "instruction": f"question {number}", "models": ["m"] * 3, "completions": completions}


def test_each_user_prefers_by_one_aspect_and_tosses_a_coin_for_ties(tmp_path):
    agreed = {**row(99), "completions": [completion("good", *"5555"), completion("bad", *"1111")]}
    file = write_jsonl(tmp_path / "uf.jsonl", [*map(row, range(40)), agreed])
    counts = write_users(file, tmp_path / "users", ASPECTS, users=2, each=20)
    assert counts == {"train": 36, "test": 4}
    files = {name: (tmp_path / f"users/{name}.jsonl").read_text() for name in counts}
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
    assert {len([r for r in rows["train"] if r["user"] == f"{aspect}-1"]) for aspect in ASPECTS} == {20}
    chosen = {aspect: [r["chosen"] for r in rows["train"] if r["group"] == aspect] for aspect in ASPECTS}
    assert (set(chosen["helpfulness"]), set(chosen["honesty"])) == ({"a"}, {"b"})
    assert set(chosen["truthfulness"]) == {"a", "b"}
    assert not {r["prompt"] for r in rows["train"]} & {r["prompt"] for r in rows["test"]}
    assert "question 99" not in {r["prompt"] for split in rows.values() for r in split}
    written = (tmp_path / "users/train.jsonl").read_bytes()
    write_users(file, tmp_path / "users", ASPECTS, users=2, each=20)
    assert (tmp_path / "users/train.jsonl").read_bytes() == written


def test_controversy_is_that_of_the_users_there_are():
    rows = [("row 0", row(0))]
    (pair,) = controversial_pairs(rows, ["helpfulness", "honesty"], 0)
    assert pair.answers == ("a", "b")
    assert not [*controversial_pairs(rows, ["helpfulness", "truthfulness"], 0)]


def test_ratings_are_texts_numbers_or_missing():
    assert [rating(value) for value in ({"Rating": "4"}, {"Rating": 2}, 3.5)] == [4.0, 2.0, 3.5]
    assert [rating(value) for value in ({"Rating": "N/A"}, {}, None, "nan")] == [None] * 4


def test_what_cannot_be_split_among_users_is_one_line(tmp_path):
    def problem(rows, aspects=ASPECTS) -> str:
        with pytest.raises(UserError) as error:
            write_users(write_jsonl(tmp_path / "bad.jsonl", rows), tmp_path / "out", aspects, users=2, each=5)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "instruction (or prompt) and completions needed" in problem([{"prompt": "p", "chosen": "a"}])
    assert "annotated with 'honestly' (did you mean 'honesty'?)" in problem([row(0)], ["honestly"])
    assert "0 controversial pairs for test" in problem([row(0), row(1)])
