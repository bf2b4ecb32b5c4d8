"""The benchmark's messages byte for byte, and a data folder that is checked before any request."""

from __future__ import annotations

import hashlib
import json

import pytest

from apo.evaluation.mixeval import benchmark as mixeval
from apo.evaluation.mixeval.benchmark import BenchmarkRow, JudgePrompts, load, load_judge_prompts
from clair.core.errors import UserError
from tests.apo.evaluation.questions import accept, write_data


def a_row(**changes) -> BenchmarkRow:
    values = {"split": "free-form", "row": 0, "benchmark": "DROP", "context": None, "prompt": "P?", "options": ()}
    return BenchmarkRow(**{**values, "target": ("a",), **changes})


# ---- by hand


@pytest.mark.parametrize("context", [None, "", "  ", "None", "null", " NONE\n"])
def test_an_unchanged_context_leaves_no_line(context):
    assert a_row(context=context).text == "Question: P?\nAnswer the question shortly."


def test_free_form_prompts_by_hand():
    assert a_row(context="C.").text == "Question: C.\nP?\nAnswer the question shortly."
    for benchmark in ("BBH", "GSM8k", "MATH"):
        expected = "Question: P?\nAnswer the question. \nLet's think step by step."
        assert a_row(benchmark=benchmark).text == expected
    assert a_row(benchmark="gsm8k").text.endswith("shortly.")


def test_multiple_choice_prompts_by_hand():
    row = a_row(split="multiple-choice", context="C.", options=("ice", "fire"), target=(1,))
    assert row.text == "C.\nP?\nA. ice\nB. fire\nAnswer with the option letter from the given choices directly."
    assert row.right == ("B",)
    assert row.letters == ("A", "B")


def test_rows_that_ask_the_same_are_one_question_and_others_are_not():
    row = a_row()
    assert row.question == a_row(row=7, benchmark="TriviaQA").question
    others = [a_row(prompt="P"), a_row(context="C"), a_row(split="multiple-choice", options=("a", "b"), target=(0,))]
    assert len({row.question, *(variant.question for variant in others)}) == 4


def test_placeholders_in_questions_and_responses_stay_text():
    prompts = JudgePrompts(dict.fromkeys(mixeval.SPLITS, "S"), dict.fromkeys(mixeval.SPLITS, "q {P} g {G} r {R} end"))
    row = a_row(prompt="{R} {G}", target=("{P}", "", "b", "b"))
    system, user = prompts.messages(row, "{P}{G}{R} {x}")
    assert system == {"role": "system", "content": "S"}
    gold = "<answer 1> {P}; <answer 2> ; <answer 3> b; <answer 4> b"
    assert user == {"role": "user", "content": f"q {{R}} {{G}} g {gold} r {{P}}{{G}}{{R}} {{x}} end"}


# ---- the real files

PROMPTS_SHA256 = {
    ("2024-06-01", "free-form"): "be554e179429f82c74dc1b00a8087eb674169897966ddbab088bfccc1f1e98b7",
    ("2024-06-01", "multiple-choice"): "b80c9cffed57ca66157588dbe195cb9b3616c883ff12c0698b9f0d5dad836d87",
    ("2024-08-11", "free-form"): "ccef1179080815df81c02b1d9d21e5ab796b24ed633f8a4968a7769b12cfb18f",
    ("2024-08-11", "multiple-choice"): "64727da87c6b27cae40768a2860f9c21305afdce4f42ef68d40e4360629f81ae",
}
"""SHA-256 of all formatted prompts of a Hard file, joined by the record separator."""


@pytest.mark.parametrize("version", mixeval.VERSIONS)
def test_the_fingerprints_of_all_prompts_of_hard(real, version):
    if not (real / version).is_dir():
        pytest.skip(f"MixEval {version} is not among the shared reference data")
    benchmark = load(real, version)
    for split in mixeval.SPLITS:
        prompts = "\x1e".join(row.text for row in benchmark.rows[split])
        assert hashlib.sha256(prompts.encode()).hexdigest() == PROMPTS_SHA256[version, split]
        assert len(benchmark.rows[split]) == 500
    counts = {"2024-06-01": (200, 246), "2024-08-11": (380, 443)}[version]
    assert tuple(len({row.question for row in benchmark.rows[split]}) for split in mixeval.SPLITS) == counts


def test_the_fingerprints_of_the_judges_messages(real):
    prompts = load_judge_prompts(real)
    prefixes = {"free-form": "64bc0973729b664e", "multiple-choice": "6c1a112b203f05b4"}
    for split, prefix in prefixes.items():
        assert hashlib.sha256(prompts.user[split].encode()).hexdigest().startswith(prefix)


def test_published_answers_were_asked_in_the_same_words(real):
    benchmark = load(real, "2024-06-01")
    for split in mixeval.SPLITS:
        for line in (real / f"responses/gemma-1.1-7b-it/{split}.jsonl").read_text("utf-8").splitlines():
            answer = json.loads(line)
            assert answer == benchmark.rows[split][int(answer["id"])].as_upstream(answer["id"]) | {
                "response": answer["response"]
            }


# ---- a folder that is not right


def test_an_altered_file_is_reported_with_the_hash_that_was_expected(data):
    file = data / "2024-06-01" / "mixeval-hard" / "multiple-choice.json"
    expected = mixeval.FILES_SHA256["2024-06-01", "multiple-choice"]
    file.write_text(file.read_text().replace("fire", "fine"))
    with pytest.raises(UserError, match=rf"multiple-choice\.json is not .* expected {expected}.*fetch-mixeval"):
        load(data, "2024-06-01")


def test_altered_judge_words_are_reported_with_the_hash_that_was_expected(data):
    file = data / "judge_prompts.json"
    file.write_text(file.read_text().replace("example", "exemple"))
    with pytest.raises(UserError, match=f"free-form judge message .* expected {mixeval.JUDGE_SHA256['free-form']}"):
        load_judge_prompts(data)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("gone", "2024-06-01"), r"does not exist; get it with `apo eval fetch-mixeval"),
        (("data", "2024-06-10"), r"did you mean '2024-06-01'\?.*known: 2024-06-01, 2024-08-11"),
        (("data", "2024-08-11"), r"free-form\.json is missing; get it with"),
        (("data", "2024-06-01", "full"), r"mixeval.free-form\.json is missing"),
    ],
)
def test_a_missing_file_is_reported_with_what_to_do(data, arguments, match):
    folder, *options = arguments
    with pytest.raises(UserError, match=match):
        load(data.parent / folder, *options)


@pytest.mark.parametrize(
    "change",
    [
        {"target": [2]},
        {"target": [0, 1]},
        {"target": ["B"]},
        {"options": None},
        {"prompt": None, "context": 1, "target": None},
    ],
)
def test_a_malformed_row_is_reported_with_its_number(tmp_path, monkeypatch, change):
    from tests.apo.evaluation.questions import FREE_FORM, MULTIPLE_CHOICE

    rows = {"free-form": FREE_FORM, "multiple-choice": [MULTIPLE_CHOICE[0], MULTIPLE_CHOICE[0] | change]}
    folder = write_data(tmp_path / "data", rows)
    accept(monkeypatch, folder)
    with pytest.raises(UserError, match=r"multiple-choice\.json, row 1: "):
        load(folder, "2024-06-01")


def test_a_limit_takes_the_first_rows_of_each_split(data):
    assert [(row.split, row.row) for row in load(data, "2024-06-01", limit=2).all_rows] == [
        ("free-form", 0),
        ("free-form", 1),
        ("multiple-choice", 0),
        ("multiple-choice", 1),
    ]


def test_the_full_benchmark_is_taken_with_a_note_or_by_the_hashes_that_were_fetched(data):
    full = data / "2024-06-01" / "mixeval"
    full.mkdir()
    for file in (data / "2024-06-01" / "mixeval-hard").iterdir():
        (full / file.name).write_bytes(file.read_bytes())
    assert len(load(data, "2024-06-01", "full").notes) == 2
    sums = {f"2024-06-01/mixeval/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in full.iterdir()}
    (data / "checksums.json").write_text(json.dumps({"sha256": sums}))
    assert load(data, "2024-06-01", "full").notes == ()
    (data / "checksums.json").write_text(json.dumps({"sha256": dict.fromkeys(sums, "0" * 64)}))
    with pytest.raises(UserError, match="expected 0000"):
        load(data, "2024-06-01", "full")
