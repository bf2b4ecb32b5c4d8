"""Response files are matched row by row to the benchmark, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apo.evaluation.answers import messages_for
from apo.evaluation.mixeval.answers import answer_requests, read_responses
from apo.evaluation.mixeval.benchmark import load
from clair.core.errors import UserError
from tests.apo.evaluation.questions import responses_of


@pytest.fixture
def responses(data, tmp_path) -> Path:
    return responses_of(data, tmp_path / "responses", say=lambda row: f"{row.split} {row.row}")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list) -> None:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_answers_go_to_their_rows_whatever_their_order(data, responses):
    benchmark = load(data, "2024-06-01")
    for split in ("free-form", "multiple-choice"):
        file = responses / f"{split}.jsonl"
        write(file, lines(file)[::-1])
    answers = read_responses(responses, benchmark)
    assert [answer.text for answer in answers] == [f"{a.row.split} {a.row.row}" for a in answers]
    assert [answer.row.row for answer in answers] == [3, 2, 1, 0, 2, 1, 0]  # the order of the files


def test_a_models_thoughts_before_its_answer_are_not_judged(data, responses):
    file = responses / "free-form.jsonl"
    write(file, [{**row, "response": f"<think>\nIs it 7?\n</think>\n\n{row['response']}"} for row in lines(file)])
    answers = read_responses(responses, load(data, "2024-06-01"))
    assert [answer.text for answer in answers] == [f"{a.row.split} {a.row.row}" for a in answers]


def test_upstreams_file_names_are_known(data, responses):
    (responses / "free-form.jsonl").rename(responses / "gemma_close_freeform_hard.jsonl")
    (responses / "multiple-choice.jsonl").rename(responses / "gemma_close_multichoice_hard.jsonl")
    (responses / "judge_results_ff_rule.jsonl").write_text("x")
    assert len(read_responses(responses, load(data, "2024-06-01"))) == 7
    (responses / "other_close_freeform_hard.jsonl").write_text("")
    with pytest.raises(UserError, match="there is 2 files"):
        read_responses(responses, load(data, "2024-06-01"))


def test_answers_to_more_rows_than_the_limit_are_left_alone(data, responses):
    answers = read_responses(responses, load(data, "2024-06-01", limit=1))
    assert [(answer.row.split, answer.row.row) for answer in answers] == [("free-form", 0), ("multiple-choice", 0)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: rows[:-1], r"no answer to 1 of 4 rows \(the first: row 3\).*--limit"),
        (lambda rows: rows[1:], "the first: row 0"),
        (lambda rows: [*rows, rows[2]], "line 5: row 2 is in line 3 already"),
        (lambda rows: [*rows[:1], "{broken", *rows[1:]], "line 2 is no response row"),
        (lambda rows: [{**rows[0], "response": None}, *rows[1:]], "line 1 is no response row: response is NoneType"),
        (lambda rows: [{k: v for k, v in rows[0].items() if k != "id"}], "the key 'id' is missing"),
        (
            lambda rows: [rows[0], {**rows[1], "prompt": "Else?"}],
            "line 2: its prompt is not that of row 1 of MixEval 202",
        ),
        (lambda rows: [{**rows[0], "target": ["Schiller"]}], "line 1: its target is not .* give the --version"),
        (lambda rows: [{"id": "0", "response": "x"}], "line 1: its prompt is not"),
    ],
)
def test_files_that_do_not_fit_are_reported(data, responses, change, match):
    file = responses / "free-form.jsonl"
    write(file, change(lines(file)))
    with pytest.raises(UserError, match=match):
        read_responses(responses, load(data, "2024-06-01"))


def test_a_missing_file_is_reported(data, tmp_path):
    with pytest.raises(UserError, match=r"neither free-form\.jsonl nor a file \*_close_freeform_hard\.jsonl"):
        read_responses(tmp_path, load(data, "2024-06-01"))


# ---- the messages to a model


def test_a_question_is_one_user_turn_and_a_system_prompt_only_where_requested(data):
    row = load(data, "2024-06-01").all_rows[0]
    assert messages_for(row, None) == [{"role": "user", "content": row.text}]
    assert messages_for(row, "Be brief.")[0] == {"role": "system", "content": "Be brief."}


def test_equal_questions_share_a_greedy_answer_and_else_draw_their_own(data):
    benchmark = load(data, "2024-06-01")
    greedy, each = (answer_requests(benchmark, 2, greedy=greedy) for greedy in (True, False))
    assert len(greedy) == len(each) == 14
    assert len({(want.row.text, want.draw) for want in greedy}) == 10  # 5 questions, 2 samples
    assert len({(want.row.text, want.draw) for want in each}) == 14
    first = [want for want in each if want.row.text == benchmark.all_rows[0].text]
    assert [(want.row.row, want.sample, want.draw) for want in first] == [
        (0, 0, 0), (0, 1, 10_000), (3, 0, 1), (3, 1, 10_001)
    ]  # fmt: skip
