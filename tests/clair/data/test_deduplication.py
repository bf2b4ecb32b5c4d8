"""Prompts left out before anything is spent: near duplicates, and a benchmark's prompts."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from clair.core.errors import UserError
from clair.data.deduplication import BenchmarkQuestions, NearDuplicates, repeated_keys
from clair.data.prompt_sources import PromptSource, each_prompt, scan

VOCABULARY = [f"w{i}" for i in range(500)]


def test_near_duplicates_are_found_and_different_texts_are_not():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(VOCABULARY, k=60)) for _ in range(300)]
    near = NearDuplicates(0.7)
    assert not any(near.is_duplicate(text) for text in texts)
    changed = [" ".join([*text.split()[:-2], "other", "end"]) for text in texts]
    assert sum(near.is_duplicate(text) for text in changed) >= 295
    halves = [" ".join([*text.split()[:30], *draw.choices(VOCABULARY, k=30)]) for text in texts]
    assert sum(near.is_duplicate(text) for text in halves) <= 5


def test_case_and_punctuation_do_not_distinguish_prompts():
    near = NearDuplicates(1.0)
    assert not near.is_duplicate("What is the capital of France?")
    assert near.is_duplicate("what is the capital of france")


def test_a_benchmark_is_known_by_13_words_in_a_row_or_a_whole_short_question():
    long = " ".join(VOCABULARY[:20])
    benchmark = BenchmarkQuestions([long, "Who wrote Faust?"])
    assert benchmark.overlaps("please tell me: " + " ".join(VOCABULARY[3:16]) + " and why")
    assert not benchmark.overlaps(" ".join(VOCABULARY[3:15]))
    assert benchmark.overlaps("who wrote faust")
    assert not benchmark.overlaps("who wrote faust and when")


def test_prompts_are_left_out_by_reason_and_the_first_stays(tmp_path):
    file, benchmark = tmp_path / "prompts.jsonl", tmp_path / "benchmark.jsonl"
    texts = ["the same thing said once more here", "the same thing said once more here!", "asked by the benchmark", "x"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*texts, texts[0]]))
    benchmark.write_text(json.dumps({"prompt": "Asked by the benchmark?"}))
    source = PromptSource(path=str(file), near_duplicates=0.9, not_in=str(benchmark))
    assert [why for _, why in each_prompt(source)] == [None, "near_duplicate", "in_benchmark", None, "duplicate"]


def test_rows_whose_key_came_before_are_found_however_many_there_are():
    draw = random.Random(0)
    keys = [draw.choice([0, 2**64 - 1, draw.getrandbits(64), draw.getrandbits(14)]) for _ in range(40_000)]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    expected = [first[key] != row for row, key in enumerate(keys)]
    assert repeated_keys(np.array(keys, np.uint64)).tolist() == expected


def test_an_id_may_stand_for_one_prompt_only_and_an_equal_row_is_a_repetition(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [("a", "one"), ("a", "one"), ("b", "two"), ("b", "two"), ("c", "three")]
    file.write_text("".join(json.dumps({"id": id, "prompt": text}) + "\n" for id, text in rows))
    scanned = scan(PromptSource(path=str(file)))
    assert (scanned.rows, scanned.unique) == (5, 3)
    assert [scanned.repeats(row) for row in range(5)] == [False, True, False, True, False]
    with open(file, "a") as lines:
        lines.write(json.dumps({"id": "c", "prompt": "four"}) + "\n")
    with pytest.raises(UserError, match="row 6: the id 'c' stands for two different prompts"):
        scan(PromptSource(path=str(file)))
