"""Tokenising pairs: the same ids as TRL, and a message for everything that goes wrong."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from trl import DPOTrainer

from apo.data.tokenize import eos_ids, tokenize
from clair.core.errors import UserError
from clair.data import preference_rows
from tests.apo.conftest import TEMPLATE, make_pairs, make_tokenizer

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenized(rows, tokenizer=None, max_length=None):
    tokenizer = tokenizer or make_tokenizer()
    return tokenize(Dataset.from_list(rows), tokenizer, max_length, eos_ids(tokenizer))


def with_text(text, column="chosen"):
    rows = make_pairs(3)
    rows[1][column][0]["content"] = text
    return rows


def test_ids_are_those_of_trl():
    rows, tokenizer = make_pairs(12), make_tokenizer()

    class Stub:
        _tokenizer = tokenizer

    class Args:
        dataset_num_proc, max_length, truncation_mode = None, None, "keep_start"

    theirs = DPOTrainer._prepare_dataset(Stub(), Dataset.from_list(rows), tokenizer, Args(), "train")
    ours = tokenized(rows).dataset
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column][:] == theirs[column][:]


def test_a_pair_by_hand():
    row = {
        "prompt": [{"role": "user", "content": "what is one"}],
        "chosen": [{"role": "assistant", "content": "two"}],
        "rejected": [{"role": "assistant", "content": "three"}],
    }
    tokenizer = make_tokenizer()
    row_ids = tokenized([row, row]).dataset[0]
    text = " ".join(tokenizer.decode(row_ids["prompt_ids"]).split())
    assert text == "<|begin|> <|start|> user what is one <|end|> <|start|> assistant"
    assert tokenizer.decode(row_ids["chosen_ids"]).split() == ["two", "<|end|>"]
    assert tokenizer.decode(row_ids["rejected_ids"]).split() == ["three", "<|end|>"]


def test_text_that_a_template_writes_after_the_end_of_turn_is_not_trained():
    tokenizer = make_tokenizer(template=CHATML)
    for row in tokenized(make_pairs(4), tokenizer).dataset:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id
        assert row["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_text_pairs_get_one_end_of_sequence():
    row = {"prompt": "what is one ", "chosen": "two", "rejected": "three <|end|>"}
    row_ids = tokenized([row, row]).dataset[0]
    assert row_ids["chosen_ids"][-1] == row_ids["rejected_ids"][-1] == 3
    assert row_ids["rejected_ids"].count(3) == 1


def test_pairs_too_long_on_either_side_are_dropped_and_counted_never_cut():
    rows = make_pairs(30)
    unlimited = tokenized(rows).dataset
    sizes = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in unlimited]
    limit = sorted(sizes)[14]
    limited = tokenized(rows, max_length=limit)
    assert limited.dropped == {"too_long": sum(size > limit for size in sizes)}
    assert limited.dataset["id"][:] == [row["id"] for row, size in zip(unlimited, sizes, strict=True) if size <= limit]
    assert [r["chosen_ids"] for r in limited.dataset] == [
        r["chosen_ids"] for r, size in zip(unlimited, sizes, strict=True) if size <= limit
    ]


def test_already_tokenised_pairs_stay_as_they_are():
    once = tokenized(make_pairs(3)).dataset
    assert tokenize(once, make_tokenizer(), None, frozenset({3})).dataset is once


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        (with_text("a question", "rejected"), None, None),
        (with_text("two <|end|>"), None, "row 1 (id p1): an answer ends with the end of turn twice"),
        (
            make_pairs(3),
            TEMPLATE.replace("<|end|>", "<|pad|>"),
            "3 of 3 rows; first row 0 (id p0): an answer does not end",
        ),
        (make_pairs(3), "<|begin|>" + TEMPLATE, "begins with the beginning-of-sequence token twice"),
    ],
    ids=["fine", "double end", "no end", "double start"],
)
def test_faults_are_reported_with_the_first_row(rows, template, message):
    tokenizer = make_tokenizer(template=template or TEMPLATE)
    if message is None:
        assert len(tokenized(rows, tokenizer).dataset) == 3
        return
    with pytest.raises(UserError) as error:
        tokenized(copy.deepcopy(rows), tokenizer)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pairs_with_equal_answers_are_left_out_and_counted():
    result = tokenized(with_text(make_pairs(3)[1]["rejected"][0]["content"]))
    assert result.dropped == {"equal": 1}
    assert result.dataset["id"][:] == ["p0", "p2"]
    (note,) = result.notes
    assert note.startswith(
        "train: chosen is equal to rejected in 1 of 3 pairs (first: row 1); nothing is preferred there"
    )


def test_pairs_that_are_all_equal_are_refused():
    rows = [{**row, "chosen": row["rejected"]} for row in make_pairs(3)]
    with pytest.raises(UserError, match=r"no pair is left to train on: .*equal to rejected in 3 of 3 pairs"):
        tokenized(rows)


def test_a_missing_column_is_reported_with_the_existing_ones():
    rows = [{"prompt": row["prompt"], "winner": row["chosen"]} for row in make_pairs(3)]
    with pytest.raises(UserError, match=r"no column 'chosen'; found: prompt, winner"):
        tokenized(rows)


def test_a_template_that_renders_the_prompt_otherwise_alone_is_noted():
    thinking = TEMPLATE.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\none {% endif %}")
    result = tokenized(make_pairs(3), make_tokenizer(template=thinking))
    assert "renders the prompt alone differently" in result.notes[0]


def test_each_row_is_read_once(monkeypatch):
    rows = [{**row, "system": "count"} for row in make_pairs(5)]
    count, read = [], preference_rows._RowReader.read
    monkeypatch.setattr(preference_rows._RowReader, "read", lambda *args: count.append(1) or read(*args))
    result = tokenize(Dataset.from_list(rows), make_tokenizer(), None, frozenset({3}))
    assert len(count) == len(result.dataset) == 5
