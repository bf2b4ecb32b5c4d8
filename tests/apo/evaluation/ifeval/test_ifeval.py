"""`apo eval ifeval`: the benchmark's published figures, answers marked by hand, traps, resuming and comparing."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import apo as public_api
from apo.evaluation.compare.run import compare_folders
from apo.evaluation.ifeval.checkers import check_instruction, follows, instruction_types
from apo.evaluation.ifeval.config import IFEvalConfig
from apo.evaluation.ifeval.run import evaluate
from apo.evaluation.records.ifeval import IFEvalItem, IFEvalScore
from apo.evaluation.results import read_results
from clair.core.errors import UserError
from clair.core.recipe import resolve
from tests.apo.evaluation.evaluating import apo, final, write_recipe
from tests.clair import tiny_model
from tests.house.pages import tables

NO_COMMA, WORDS, TITLE = "punctuation:no_comma", "length_constraints:number_words", "detectable_format:title"
SENTENCES = "length_constraints:number_sentences"
AT_LEAST_THREE = {"relation": "at least", "num_words": 3}
LESS_THAN_TWO = {"relation": "less than", "num_sentences": 2}
TWO_CAPITALS = {"capital_relation": "at least", "capital_frequency": 2}
ROWS = [
    {"key": 1, "prompt": "Describe a lake.", "instruction_id_list": [NO_COMMA], "kwargs": [{}]},
    {"key": 2, "prompt": "And a hill.", "instruction_id_list": [NO_COMMA, WORDS], "kwargs": [{}, AT_LEAST_THREE]},
    {"key": 3, "prompt": "And a city.", "instruction_id_list": [TITLE], "kwargs": [{}]},
]
ANSWERS = {
    "Describe a lake.": "Deep, and blue.",
    "And a hill.": "Sure, here it is:\nA green hill",
    "And a city.": "<<Rome>>",
}


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def write_answers(file: Path, answers: dict[str, str]) -> Path:
    return write_rows(file, [{"prompt": prompt, "response": answer} for prompt, answer in answers.items()])


def config_for(folder: Path, **changes: object) -> IFEvalConfig:
    """A config whose prompts are ROWS and whose answers are ANSWERS, unless `changes` names others."""
    values = {"prompts": str(write_rows(folder / "prompts.jsonl", ROWS)), "out": str(folder / "out")}
    if "model" not in changes and "responses" not in changes:
        values["responses"] = str(write_answers(folder / "answers.jsonl", ANSWERS))
    return resolve(IFEvalConfig, values | {key: value for key, value in changes.items() if value is not None})


def refusal(folder: Path, row: dict) -> str:
    with pytest.raises(UserError) as error:
        evaluate(config_for(folder, prompts=str(write_rows(folder / "bad.jsonl", [ROWS[0], row]))))
    assert not (folder / "out").exists()
    return str(error.value)


# ---- the published figures


def test_the_published_answers_of_gpt4_get_the_published_scores_within_two_prompts(shared, tmp_path):
    data = shared / "data" / "ifeval"
    if not data.is_dir():
        pytest.skip("no IFEval data among the shared reference data")
    files = {"prompts": str(data / "input_data.jsonl"), "responses": str(data / "gpt4_responses.jsonl")}
    score = evaluate(resolve(IFEvalConfig, {**files, "out": str(tmp_path / "out")})).score
    assert isinstance(score, IFEvalScore)
    counts = {name: round(interval.mean * interval.n) for name, interval in score.intervals.items()}
    sizes = {name: (interval.n, interval.clusters) for name, interval in score.intervals.items()}
    assert sizes == dict.fromkeys(("prompt_loose", "prompt_strict"), (541, 541)) | dict.fromkeys(
        ("instruction_loose", "instruction_strict"), (834, 541)
    )
    assert counts == {"prompt_loose": 431, "prompt_strict": 417, "instruction_loose": 713, "instruction_strict": 697}
    assert abs(counts["prompt_strict"] - 0.7689 * 541) < 1.1
    assert abs(counts["instruction_strict"] - 0.8357 * 834) < 1
    assert score.unresolved_reasons == {"answer_missing": 1}
    assert len(score.by_type) == 25
    assert sum(numbers.loose.n for numbers in score.by_type.values()) == 834


def test_checking_sentences_unpickles_nothing(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("something is unpickled")

    instruction_types()
    from if_verifiable.ifeval import instructions_util

    instructions_util._get_sentence_tokenizer.cache_clear()
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert follows("p", [SENTENCES], [LESS_THAN_TWO], "Dr. Ho is in.") == [(True, True)]


# ---- answers marked by hand


@pytest.mark.parametrize(
    ("name", "arguments", "answer", "loose", "strict"),
    [
        (NO_COMMA, {}, "A lake and a hill.", True, True),
        (NO_COMMA, {}, "A lake, and a hill.", False, False),
        (NO_COMMA, {}, "Sure, here it is:\nA lake", True, False),
        (NO_COMMA, {}, "A lake\nI hope it helps, friend", True, False),
        (NO_COMMA, {}, "Well, now:\nA lake\nBye, friend", True, False),
        (NO_COMMA, {}, "A lake\nBye, friend\nThe end", False, False),
        (WORDS, AT_LEAST_THREE, "one two three", True, True),
        (WORDS, AT_LEAST_THREE, "one two", False, False),
        ("change_case:english_lowercase", {}, "the lake is deep and it is blue\nThe End", True, False),
        ("startend:quotation", {}, '"A lake"', True, True),
        ("startend:quotation", {}, '**"A lake"**', True, False),
        (SENTENCES, LESS_THAN_TWO, "Dr. Ho is in.", True, True),
        (SENTENCES, LESS_THAN_TWO, "He is in. Go.", False, False),
        ("change_case:capital_word_frequency", TWO_CAPITALS, "IT IS so", True, True),
        ("language:response_language", {"language": "de"}, "Das Haus steht am See und ist alt.", True, True),
        ("language:response_language", {"language": "de"}, "The house is at the lake and old.", False, False),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. It is so.", True, True),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "It is so.", False, False),
    ],
)  # fmt: skip
def test_an_answer_follows_an_instruction_as_one_reads_it(name, arguments, answer, loose, strict):
    check_instruction(name, arguments)
    assert follows("p", [name], [arguments], answer) == [(loose, strict)]


def test_scores_by_pencil(tmp_path):
    # Lake: a comma. Hill: a comma in the first line, which loose removes; enough words. City: a title.
    outcome = evaluate(config_for(tmp_path))
    score = outcome.score
    assert score is not None
    assert (score.prompt_loose, score.prompt_strict) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (score.instruction_loose, score.instruction_strict) == (0.75, 0.5)
    assert {name: (n.loose.mean, n.strict.mean) for name, n in score.by_type.items()} == {
        NO_COMMA: (0.5, 0.0), WORDS: (1.0, 1.0), TITLE: (1.0, 1.0)
    }  # fmt: skip
    assert score.intervals["instruction_loose"].clusters == 3
    assert "prompt-level loose 66.7 %" in repr(outcome)


@pytest.mark.parametrize("answer", ["", " \n", "<think>A lake</think>", "<think>I think of a lake"])
def test_an_answer_without_a_word_follows_no_instruction(tmp_path, answer):
    assert follows("p", [NO_COMMA, TITLE], [{}, {}], answer) == [(False, False), (False, False)]
    responses = str(write_answers(tmp_path / "empty.jsonl", {**ANSWERS, "And a hill.": answer}))
    score = evaluate(config_for(tmp_path, responses=responses)).score
    assert score.intervals["instruction_strict"].n == 4
    assert (score.instruction_strict, score.unresolved) == (0.25, 0)


def test_more_brackets_than_a_parser_can_follow_are_no_json_and_leave_the_other_instructions_alone():
    answer = "[" * 5000
    assert follows("p", ["detectable_format:json_format", NO_COMMA], [{}, {}], answer) == [(False, False), (True, True)]


def test_a_prompt_without_an_answer_is_wrong_and_named(tmp_path):
    responses = write_answers(tmp_path / "two.jsonl", {"And a city.": "<<Rome>>", "Describe a lake.": "Blue"})
    recipe = write_recipe(tmp_path / "r.yaml", **config_for(tmp_path, responses=str(responses)).model_dump())
    result = apo("eval", "ifeval", recipe)
    assert result.code == 0
    assert "1 of 3 prompts have no answer" in result.err
    score = read_results(tmp_path / "out").score
    assert score.prompt_strict == pytest.approx(2 / 3)
    assert score.intervals["prompt_strict"].bracket == (pytest.approx(2 / 3), 1.0)


# ---- refused before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "no checker for 'punctuation:no_coma' (did you mean"),
        ({"instruction_id_list": [WORDS]}, "takes the kwargs num_words, relation, and it has none"),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": 3, "relation": None}]}, "and it has num_words"),
        ({"kwargs": [{"num_words": 3}]}, "takes the kwargs none, and it has num_words"),
        ({"kwargs": []}, "1 instructions and 0 kwargs"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": []}]}, "by a random one"),
        ({"instruction_id_list": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": -1}]}, "random"),
        ({"instruction_id_list": [WORDS], "kwargs": [{"num_words": 3, "relation": "about"}]}, "cannot check"),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]}, "cannot check"),
        ({"key": 1}, "the key 1 occurs twice"),
        ({"prompt": " "}, "a text that is not empty"),
    ],
)
def test_a_row_that_the_library_would_skip_or_guess_is_refused(tmp_path, change, message):
    error = refusal(tmp_path, {**ROWS[0], "key": 9, **change})
    assert "bad.jsonl, line 2" in error
    assert message in error


def test_a_row_without_a_key_of_the_format_is_refused(tmp_path):
    assert "the key 'kwargs' is missing" in refusal(tmp_path, {k: v for k, v in ROWS[1].items() if k != "kwargs"})


def test_answers_to_other_prompts_two_answers_and_unknown_types_in_groups_are_refused(tmp_path):
    other = write_answers(tmp_path / "other.jsonl", {"Another prompt": "x"})
    with pytest.raises(UserError, match="answers none of the 3 prompts"):
        evaluate(config_for(tmp_path, responses=str(other)))
    twice = write_rows(tmp_path / "twice.jsonl", [{"prompt": "And a city.", "response": "x"}] * 2)
    with pytest.raises(UserError, match=r"twice.jsonl, line 2: this prompt has an answer already"):
        evaluate(config_for(tmp_path, responses=str(twice)))
    with pytest.raises(UserError, match=r"groups.seen: no instruction type 'punctuation:no_coma' \(did you mean"):
        evaluate(config_for(tmp_path, groups={"seen": ["punctuation:no_coma"]}))


def test_without_the_library_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    instruction_types.cache_clear()
    monkeypatch.setitem(sys.modules, "punkt", None)
    with pytest.raises(UserError, match=r"pip install 'clair-apo\[ifeval\]'"):
        evaluate(config_for(tmp_path))
    monkeypatch.undo()
    assert len(instruction_types()) == 25


# ---- always the same


@given(st.integers(), st.text(max_size=80))
def test_the_same_answer_gets_the_same_marks_whatever_was_drawn_before(seed, answer):
    sign = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}  # the checker replaces it by a letter
    names, arguments = ["keywords:letter_frequency", "language:response_language"], [sign, {"language": "en"}]
    check_instruction(names[0], sign)
    expected = follows("p", names, arguments, answer)
    random.seed(seed)
    state = random.getstate()
    assert follows("p", names, arguments, answer) == expected
    assert random.getstate() == state


def test_the_same_command_gives_the_same_files(tmp_path):
    evaluate(config_for(tmp_path))
    first = final(tmp_path / "out")
    evaluate(config_for(tmp_path))
    assert final(tmp_path / "out") == first
    evaluate(config_for(tmp_path, groups={"punctuation": [NO_COMMA]}))
    assert list(read_results(tmp_path / "out").score.by_group) == ["punctuation"]
    other = config_for(tmp_path, responses=str(write_answers(tmp_path / "other.jsonl", ANSWERS)))
    with pytest.raises(UserError, match="other settings"):
        evaluate(other)


# ---- a model


def test_a_model_answers_and_nothing_is_requested_twice(tmp_path, server):
    model = {"url": server.url, "model": "t"}
    score = evaluate(config_for(tmp_path, model=model, limit=2)).score
    assert score is not None
    bodies = server.requests()
    assert [body["messages"] for body in bodies] == [[{"role": "user", "content": r["prompt"]}] for r in ROWS[:2]]
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0.0, 1280)}
    first = final(tmp_path / "out")
    score = evaluate(config_for(tmp_path, model=model, limit=2)).score
    assert (server.paid(), score.usage["model"].calls, score.usage["model"].reused) == (2, 0, 2)
    assert final(tmp_path / "out") == first
    evaluate(config_for(tmp_path, model=model))
    assert server.paid() == 3


def test_cut_answers_are_scored_as_they_are_and_refused_ones_leave_only_a_bracket(tmp_path, server):
    prompts = ["<<LENGTH:A lake>> Describe it.", "<<HTTP400>>", "<<FILTER:A hill>>"]
    rows = [{**ROWS[0], "key": key, "prompt": prompt} for key, prompt in enumerate(prompts)]
    file = write_rows(tmp_path / "scripted.jsonl", rows)
    model = {"url": server.url, "model": "t"}
    recipe = write_recipe(tmp_path / "r.yaml", prompts=file, model=model, out=tmp_path / "out", limit=1)
    cut = apo("eval", "ifeval", recipe)
    assert cut.code == 0
    assert "1 of 1 answers reached the token limit; they are scored as they are" in cut.err
    assert read_results(tmp_path / "out").score.prompt_strict == 1
    refused = apo("eval", "ifeval", recipe, "--set", "limit=3", "--out", tmp_path / "three")
    assert refused.code == 3
    assert "1 prompts were refused (http_400: " in refused.err
    _, score, items = read_results(tmp_path / "three")
    assert [(item.response, item.score) for item in items] == [("A lake", 1), ("", 0), ("A hill", 0)]
    assert (score.prompt_loose, score.by_type[NO_COMMA].strict.mean) == (None, None)
    assert score.intervals["prompt_loose"].bracket == (pytest.approx(1 / 3), 1)
    assert score.unresolved_reasons == {"answer_content_filter": 1, "answer_http_400": 1}
    assert (score.unanswered, score.truncated) == (1, 1)


def test_an_interrupted_evaluation_goes_on_and_nothing_is_requested_twice(tmp_path, server):
    config = config_for(tmp_path, model={"url": server.url, "model": "t"}, concurrency=1)

    def interrupt(count: int, _: object) -> None:
        if count == 1:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = evaluate(config, on_progress=interrupt)
    assert outcome.stopped == "interrupted"
    assert not (tmp_path / "out" / "score.json").exists()
    assert 0 < server.paid() < 3
    evaluate(config)
    assert server.paid() == 3
    evaluate(config_for(tmp_path, model={"url": server.url, "model": "t"}, out=str(tmp_path / "undisturbed")))
    assert final(tmp_path / "out") == final(tmp_path / "undisturbed")


def test_several_model_folders_are_evaluated_into_folders_of_their_own(tmp_path):
    models = [tiny_model.save(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "tuned"))]
    values = {"prompts": write_rows(tmp_path / "p.jsonl", ROWS), "model": {"path": models[0], "max_tokens": 8}}
    recipe = write_recipe(tmp_path / "r.yaml", **values, out=tmp_path / "out")
    chosen = [word for model in models for word in ("--model", model)]
    shown = apo("eval", "ifeval", recipe, *chosen, "--dry-run")
    assert (shown.code, shown.out.count("# 3 prompts, 4 instructions, 3 answers")) == (0, 2)
    assert not (tmp_path / "out").exists()
    result = apo("eval", "ifeval", recipe, *chosen)
    assert result.code == 0, result.err
    scores = [read_results(tmp_path / "out" / name).score for name in ("base", "tuned")]
    assert len({score.model.identity for score in scores}) == 2
    assert scores[0].model.options == {"temperature": 0.0, "max_tokens": 8, "seed": 0}
    assert apo("compare", tmp_path / "out" / "base", tmp_path / "out" / "tuned").code == 0


@pytest.mark.slow  # ten answers of a model of 135 million parameters
def test_a_real_model_answers_the_first_prompts(shared, real_model, tmp_path):
    model = {"path": str(real_model), "max_tokens": 24}
    prompts = shared / "data" / "ifeval" / "input_data.jsonl"
    score = evaluate(config_for(tmp_path, prompts=str(prompts), model=model, limit=4)).score
    assert score is not None
    items = read_results(tmp_path / "out").items
    assert [item.prompt_key for item in items] == [1000, 1001, 1005, 1012]
    assert all(item.response and item.completion_tokens <= 24 for item in items)
    assert score.truncated == sum(item.truncated for item in items) > 0


def test_evaluate_ifeval_is_the_command_in_python(tmp_path):
    outcome = public_api.evaluate_ifeval(config_for(tmp_path), out=tmp_path / "python", show_progress=False)
    assert outcome.headline.startswith("prompt-level loose 66.7 %, 95 % interval ")
    assert outcome.table().row_count == 5
    evaluate(config_for(tmp_path))
    assert final(tmp_path / "python") == final(tmp_path / "out")


# ---- comparing


def test_two_results_are_compared_by_measure_group_and_type(tmp_path):
    groups = {"seen": [NO_COMMA], "unseen": [WORDS, TITLE], "absent": ["startend:quotation"]}
    evaluate(config_for(tmp_path, groups=groups))
    tuned = write_answers(
        tmp_path / "tuned.jsonl", {**ANSWERS, "Describe a lake.": "Blue", "And a hill.": "A green hill"}
    )
    evaluate(config_for(tmp_path, groups=groups, responses=str(tuned), out=str(tmp_path / "tuned")))
    result = compare_folders(tmp_path / "out", [tmp_path / "tuned"])
    numbers = {
        (part["level"], part["split"], part["benchmark"]): (part["rows"], part["clusters"], part["tuned"][0]["delta"])
        for part in result.content["parts"]
    }
    third, quarter, half = pytest.approx(1 / 3), pytest.approx(1 / 4), pytest.approx(1 / 2)
    assert numbers == {
        ("overall", "prompt_loose", None): (3, 3, third),
        ("split", "prompt_strict", None): (3, 3, pytest.approx(2 / 3)),
        ("split", "instruction_loose", None): (4, 3, quarter),
        ("split", "instruction_strict", None): (4, 3, half),
        ("split", "instruction_loose", "seen"): (2, 2, half),
        ("split", "instruction_loose", "unseen"): (2, 2, 0),
        ("benchmark", "instruction_loose", WORDS): (1, 1, 0),
        ("benchmark", "instruction_loose", TITLE): (1, 1, 0),
        ("benchmark", "instruction_loose", NO_COMMA): (2, 2, half),
    }
    shown = apo("compare", tmp_path / "out", tmp_path / "tuned", "--out", tmp_path / "c")
    assert shown.code == 0
    assert all(text in shown.out for text in ("prompts, strict", "instructions, loose", "seen", "unseen", "+33.3"))
    assert "punctuation:no_comma: followed" in (tmp_path / "c" / "compare.html").read_text("utf-8")


def test_results_of_other_benchmarks_prompts_and_groups_are_not_compared(tmp_path):
    evaluate(config_for(tmp_path))
    evaluate(config_for(tmp_path, limit=2, out=str(tmp_path / "short")))
    evaluate(config_for(tmp_path, groups={"seen": [NO_COMMA]}, out=str(tmp_path / "grouped")))
    for folder, name in (("short", "data is"), ("grouped", "groups is")):
        with pytest.raises(UserError, match=f"cannot be compared: {name}"):
            compare_folders(tmp_path / "out", [tmp_path / folder])
    tuned = write_answers(tmp_path / "tuned.jsonl", {"And a city.": "x"})
    evaluate(config_for(tmp_path, responses=str(tuned), out=str(tmp_path / "tuned")))
    with pytest.raises(UserError, match="--data is for results of MixEval"):
        compare_folders(tmp_path / "out", [tmp_path / "tuned"], data=tmp_path)


# ---- the page


@pytest.mark.parametrize(("name", "model"), [("ifeval score", IFEvalScore), ("ifeval items", IFEvalItem)])
def test_every_key_of_the_result_files_is_documented(name, model):
    ((_, _, (_, *rows)),) = tables(name)
    documented = [key.strip("` ") for row in rows for key in row[0].split(",")]
    assert sorted(documented) == sorted(model.model_fields)
