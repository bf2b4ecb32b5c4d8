"""Whole evaluations: by rule, by a judge over HTTP, of an endpoint and of response files."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from apo.evaluation.mixeval.config import MixEvalConfig
from apo.evaluation.mixeval.run import MixEvalRun
from apo.evaluation.results import read_results
from apo.evaluation.winrate.run import WinrateConfig
from clair.core.errors import UserError
from clair.core.recipe import load_recipe
from clair.inference.client import StopSignal
from tests.apo.evaluation.evaluating import apo, config_for, evaluated, final, judging, mixeval_command
from tests.apo.evaluation.questions import JUDGE, responses_of
from tests.clair.building import error_line
from tests.house.pages import ROOT


@pytest.fixture
def responses(data, tmp_path) -> Path:
    return responses_of(data, tmp_path / "responses")


def scripted(data: Path, folder: Path, **replies: str) -> Path:
    """Response files that make the judge say `replies[ff3]` about row 3 of the free-form questions."""

    def say(row) -> str:
        name = f"{'ff' if row.split == 'free-form' else 'mc'}{row.row}"
        return f"<<{replies.get(name, '[[1.0]]' if row.split == 'free-form' else '[[A]]')}>> {name}"

    return responses_of(data, folder, say)


# ---- the published answers of Gemma 1.1 7B

MC_FAITHFUL = {
    "AGIEval": 19, "ARC": 0, "BoolQ": 23, "CommonsenseQA": 18, "GPQA": 0, "HellaSwag": 14, "MBPP": 2, "MMLU": 85,
    "OpenBookQA": 4, "PIQA": 5, "SIQA": 7,
}  # fmt: skip
MC_STRICT = MC_FAITHFUL | {"AGIEval": 16, "BoolQ": 22, "HellaSwag": 12, "MMLU": 80}
FREE_FORM = {"AGIEval": 0, "BBH": 2, "DROP": 58, "GSM8k": 4, "MATH": 0, "TriviaQA": 38}


@pytest.mark.parametrize(
    ("profile", "multiple_choice", "overall", "by_benchmark", "fallbacks"),
    [("faithful", 0.354, 0.279, MC_FAITHFUL, 47), ("strict", 0.332, 0.268, MC_STRICT, 0)],
)
def test_the_rule_parsers_published_numbers(real, tmp_path, profile, multiple_choice, overall, by_benchmark, fallbacks):
    gemma = str(real / "responses" / "gemma-1.1-7b-it")
    score = evaluated(real, tmp_path / "out", responses=gemma, profile=profile).score
    assert (score.free_form, score.multiple_choice, score.overall) == (0.204, multiple_choice, overall)
    right = {
        split: {name: benchmark.right for name, benchmark in benchmarks.items()}
        for split, benchmarks in score.by_benchmark.items()
    }
    assert right == {"free-form": FREE_FORM, "multiple-choice": by_benchmark}
    assert (score.unresolved, score.fallbacks) == (47, fallbacks)
    interval = score.intervals["overall"]
    assert (interval.n, interval.questions, interval.clusters) == (1000, 446, 430)
    assert interval.se_naive == pytest.approx(0.014, abs=0.0005)
    assert interval.se_clustered == pytest.approx(0.0245, abs=0.0005)


def test_equal_judgements_are_requested_once_and_a_second_run_requests_nothing(real, tmp_path, server):
    options = {"responses": str(real / "responses" / "gemma-1.1-7b-it"), "judge": {"url": server.url, "model": "j"}}
    first = evaluated(real, tmp_path / "out", **options)
    assert server.paid() == first.requests == 451
    assert first.score.shared_judgements
    assert (first.score.usage["judge"].calls, first.score.usage["judge"].reused) == (451, 549)
    files = final(tmp_path / "out")
    again = evaluated(real, tmp_path / "out", **options)
    assert server.paid() == 451
    assert final(tmp_path / "out") == files
    assert (again.score.usage["judge"].calls, again.requests) == (0, 451)
    # Another run, with the same ledger, has nothing to ask either.
    evaluated(real, tmp_path / "other", ledger=str(tmp_path / "out" / "ledger.sqlite"), **options)
    assert server.paid() == 451


# ---- what is sent


def test_a_faithful_request_is_upstreams_and_a_strict_one_repeatable(data, responses, tmp_path, server):
    judge = {"url": server.url, "model": "j"}
    evaluated(data, tmp_path / "faithful", responses=str(responses), judge=judge)
    body = next(body for body in server.requests() if "pears" in body["messages"][1]["content"])
    text = JUDGE["free_form"]["user"].replace("{P}", "How many pears?").replace("{G}", "<answer 1> 3; <answer 2> 3")
    assert body == {
        "model": "j",
        "max_tokens": 999,
        "response_format": {"type": "text"},
        "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": text.replace("{R}", "3")}],
    }
    server.forget()
    evaluated(data, tmp_path / "strict", responses=str(responses), judge=judge, profile="strict")
    assert all((body["temperature"], body["seed"]) == (0.0, 42) for body in server.requests())
    assert len(server.requests()) == 5


def test_independent_judgements_are_requested_one_by_one_and_resumed(data, responses, tmp_path, server):
    judge = {"url": server.url, "model": "j"}
    result = evaluated(data, tmp_path / "out", responses=str(responses), judge=judge, independent_judgements=True)
    assert server.paid() == result.requests == 7
    assert not result.score.shared_judgements
    evaluated(data, tmp_path / "out", responses=str(responses), judge=judge, independent_judgements=True)
    assert server.paid() == 7


def test_an_unreadable_reply_is_requested_again_up_to_ten_rounds_in_faithful(data, tmp_path, server):
    folder = scripted(data, tmp_path / "r", ff0="what?|[[0.4]]", ff1="no", mc0="[[b]]|[[b]]|[[B]]", mc1="[[Z]]")
    judge = {"url": server.url, "model": "j"}
    score = evaluated(data, tmp_path / "out", responses=str(folder), judge=judge).score
    items = {(item.split, item.row): item for item in read_results(tmp_path / "out").items}
    assert [(items["free-form", n].score, items["free-form", n].rounds) for n in (0, 3)] == [(0.4, 2), (1.0, 1)]
    assert (items["free-form", 1].rounds, items["free-form", 1].unresolved) == (10, "no_brackets")
    assert items["free-form", 1].fallback
    assert (items["multiple-choice", 0].score, items["multiple-choice", 0].rounds) == (1.0, 3)
    # A letter past the options: wrong, and settled.
    assert (items["multiple-choice", 1].score, items["multiple-choice", 1].unresolved) == (0.0, None)
    assert (score.unresolved, score.fallbacks, score.unresolved_reasons) == (1, 1, {"no_brackets": 1})
    assert server.paid() == 2 + 10 + 1 + 1 + 3 + 1 + 1
    files = final(tmp_path / "out")
    evaluated(data, tmp_path / "out", responses=str(folder), judge=judge)
    assert final(tmp_path / "out") == files


def test_strict_asks_once_and_counts_what_cannot_be_read_as_wrong(data, tmp_path, server):
    folder = scripted(data, tmp_path / "r", ff0="what?|[[0.4]]", mc1="[[Z]]", mc0="HTTP400")
    judge = {"url": server.url, "model": "j"}
    score = evaluated(data, tmp_path / "out", responses=str(folder), judge=judge, profile="strict").score
    assert score.unresolved_reasons == {"judge_http_400": 1, "no_brackets": 1, "past_options": 1}
    assert (score.fallbacks, server.paid()) == (0, 7)
    assert score.free_form == 3 / 4
    assert score.intervals["free_form"].bracket == (3 / 4, 1.0)


def test_profiles_and_other_settings_are_never_mixed_in_a_folder(data, responses, tmp_path, server):
    judge = {"url": server.url, "model": "j"}
    evaluated(data, tmp_path / "out", responses=str(responses), judge=judge)
    with pytest.raises(UserError, match=r"other settings \(it differs in profile\); choose another --out"):
        evaluated(data, tmp_path / "out", responses=str(responses), judge=judge, profile="strict")
    with pytest.raises(UserError, match="differs in judge"):
        evaluated(data, tmp_path / "out", responses=str(responses))
    assert server.paid() == 5
    assert evaluated(data, tmp_path / "out", responses=str(responses), judge=judge, concurrency=3).score


def test_several_judges_share_the_work_and_one_that_is_dead_is_left_aside(data, responses, tmp_path, server):
    dead = "http://127.0.0.1:9/v1"
    with judging() as second:
        urls = (server.url, second.url, dead)
        result = evaluated(data, tmp_path / "out", responses=str(responses), judge={"url": urls, "model": "j"})
        assert result.score.unresolved == 0
        assert second.paid() > 0
        assert server.paid() + second.paid() == 5


# ---- an endpoint that answers


def test_an_endpoints_answers_are_made_once_and_judged(data, tmp_path, server):
    options = {
        "model": {"url": server.url, "model": "t", "max_tokens": 512},
        "judge": {"url": server.url, "model": "j"},
        "samples": 2,
    }
    result = evaluated(data, tmp_path / "out", **options)
    requests = server.requests()
    answers = [body for body in requests if body["model"] == "t"]
    # It may sample, so every row and sample draws its own; greedy ones are shared below.
    assert len(answers) == 14
    assert all(set(body) == {"model", "messages", "max_tokens"} for body in answers)
    assert all(body["max_tokens"] == 512 and len(body["messages"]) == 1 for body in answers)
    items = read_results(tmp_path / "out").items
    assert {(item.split, item.row, item.sample) for item in items} == {
        (split, row, sample)
        for split, n in (("free-form", 4), ("multiple-choice", 3))
        for row in range(n)
        for sample in (0, 1)
    }
    assert all(item.completion_tokens for item in items)
    assert result.score.model.name == "t"
    assert result.score.judge.answered_by == ("j-0125",)
    evaluated(data, tmp_path / "out", **options)
    assert server.paid() == len(requests)
    server.forget()
    options["model"] = options["model"] | {"temperature": 0}
    evaluated(data, tmp_path / "greedy", **options | {"samples": 1})
    assert len([body for body in server.requests() if body["model"] == "t"]) == 5


def test_the_longest_answer_is_an_option_and_part_of_what_is_compared(data, tmp_path, server):
    model = {"url": server.url, "model": "t"}
    for name, limit in (("usual", {}), ("short", {"max_tokens": 9})):
        result = apo(*mixeval_command(data, tmp_path / name, model=model | limit, judge="rule"))
        assert result.code == 0, result.err
    assert {body["max_tokens"] for body in server.requests()} == {512, 9}
    refused = apo("compare", tmp_path / "usual", tmp_path / "short")
    assert refused.code == 2
    assert "max_tokens is 9 in one and 512 in the other" in refused.err


def test_a_system_prompt_is_sent_and_recorded(data, tmp_path, server):
    model = {"url": server.url, "model": "t", "max_tokens": 512}
    score = evaluated(data, tmp_path / "out", model=model, system="Be brief.").score
    assert all(body["messages"][0] == {"role": "system", "content": "Be brief."} for body in server.requests())
    assert score.system == "Be brief."


def test_an_endpoint_that_truncates_or_refuses_gives_named_items(tmp_path, monkeypatch, server):
    from tests.apo.evaluation.questions import FREE_FORM as ff
    from tests.apo.evaluation.questions import MULTIPLE_CHOICE, accept, write_data

    scripts = ("<<LENGTH:Goe>>", "<<HTTP400>>", "<<FILTER:Four, of>>")
    free_form = [*({**row, "prompt": script} for row, script in zip(ff, scripts, strict=False)), ff[3]]
    data = write_data(tmp_path / "data", {"free-form": free_form, "multiple-choice": MULTIPLE_CHOICE})
    accept(monkeypatch, data)
    score = evaluated(data, tmp_path / "out", model={"url": server.url, "model": "t"}, profile="strict").score
    items = {(item.split, item.row): item for item in read_results(tmp_path / "out").items}
    assert (items["free-form", 0].truncated, items["free-form", 0].response) == (True, "Goe")
    assert items["free-form", 1].unresolved == "answer_http_400"
    assert items["free-form", 2].unresolved == "answer_content_filter"
    assert items["free-form", 2].response == "Four, of"
    assert score.truncated == 1
    assert score.unresolved_reasons["answer_http_400"] == score.unresolved_reasons["answer_content_filter"] == 1
    # What was cut off is judged, and is in the bracket of strict only.
    right = items["free-form", 3].score
    assert score.intervals["free_form"].bracket == (right / 4, (right + 3) / 4)
    faithful = evaluated(data, tmp_path / "faithful", model={"url": server.url, "model": "t"}).score
    low, high = faithful.intervals["free_form"].bracket
    assert high - low == pytest.approx(2 / 4)


def test_a_model_that_refuses_every_question_is_reported_with_its_message(tmp_path, monkeypatch, server):
    from tests.apo.evaluation.questions import FREE_FORM as ff
    from tests.apo.evaluation.questions import MULTIPLE_CHOICE as mc
    from tests.apo.evaluation.questions import accept, write_data

    rows = [{**ff[0], "prompt": f"{n} <<HTTP400>>"} for n in range(200)]
    many = write_data(tmp_path / "many", {"free-form": rows, "multiple-choice": pair_rows(mc)})
    accept(monkeypatch, many)
    with pytest.raises(UserError, match=r"refuses every request .*\(400: System role not supported\)"):
        evaluated(many, tmp_path / "out", model={"url": server.url, "model": "t"}, system="Hi", concurrency=5)
    assert server.paid() < 60
    few = write_data(tmp_path / "few", {"free-form": rows[:2], "multiple-choice": pair_rows(mc)})
    accept(monkeypatch, few)
    with pytest.raises(UserError, match="refuses every request"):
        evaluated(few, tmp_path / "out2", model={"url": server.url, "model": "t"}, system="Hi")
    assert not (tmp_path / "out2" / "score.json").exists()


def pair_rows(multiple_choice: list) -> list:
    return [{**row, "prompt": "<<HTTP400>>"} for row in multiple_choice]


def test_a_judge_that_is_gone_gives_no_score_and_a_rerun_resumes(data, tmp_path, server):
    folder = scripted(data, tmp_path / "r", ff1="HTTP500")
    judge = {"url": server.url, "model": "j"}
    result = evaluated(data, tmp_path / "out", responses=str(folder), judge=judge, attempts=1)
    assert (result.score, result.failed) == (None, 1)
    assert "500" in result.first_failure
    assert not (tmp_path / "out" / "score.json").exists()
    assert server.paid() == 7
    evaluated(data, tmp_path / "out", responses=str(folder), judge=judge, attempts=1)
    assert server.paid() == 8


API_ERRORS = [("HTTP402", "402"), ("HTTP413", "413"), ("BODY429", "Rate limit exceeded"), ("HTTP400", "400")]


@pytest.mark.parametrize("profile", ["faithful", "strict"])
@pytest.mark.parametrize(("error", "reason"), API_ERRORS)
def test_an_error_of_the_judges_server_is_no_score_and_the_command_resumes(
    data, tmp_path, server, profile, error, reason, monkeypatch
):
    monkeypatch.setattr("clair.inference.client._FIRST_BACKOFF", 0.001)
    monkeypatch.setattr("clair.inference.rate_limit.PAUSE", 0.001)
    later = "|".join([error] * (6 if error == "BODY429" else 1) + ["[[1]]"])  # as often as it is asked by default
    folder = scripted(data, tmp_path / "r", ff0=later, ff1="[[0]]")
    judge = {"url": server.url, "model": "j"}
    arguments = mixeval_command(data, tmp_path / "out", responses=folder, judge=judge, profile=profile)
    first = apo(*arguments)
    assert first.code == 3
    assert reason in first.err
    assert error == "HTTP402" or "there is no score" in first.err
    score = tmp_path / "out" / "score.json"
    assert not score.exists() or json.loads(score.read_text("utf-8"))["overall"] is None
    again = apo(*arguments)
    assert (again.code, json.loads(score.read_text("utf-8"))["free_form"]) == (0, 0.75), again.err


@pytest.mark.parametrize("profile", ["faithful", "strict"])
def test_a_judgement_that_a_filter_blocked_is_requested_once_and_is_no_score(data, tmp_path, server, profile):
    folder = scripted(data, tmp_path / "r", ff0="FILTER:")
    judge = {"url": server.url, "model": "j"}
    score = evaluated(data, tmp_path / "out", responses=str(folder), judge=judge, profile=profile).score
    assert (score.overall, score.free_form, score.multiple_choice) == (None, None, pytest.approx(1 / 3, abs=1e-3))
    assert score.unresolved_reasons == {"judge_content_filter": 1}
    assert (score.fallbacks, server.paid()) == (0, 7)


def test_a_server_without_money_from_the_first_request_on_ends_with_code_3(data, tmp_path, server):
    folder = responses_of(data, tmp_path / "r", lambda row: f"<<HTTP402>> {row.split} {row.row}")
    judge = {"url": server.url, "model": "j"}
    result = apo(*mixeval_command(data, tmp_path / "out", responses=folder, judge=judge))
    assert result.code == 3, result.err
    assert "402" in result.err


def test_a_server_that_is_only_busy_ends_the_command_after_its_patience(data, tmp_path, server):
    folder = scripted(data, tmp_path / "r", ff0="BODY429")
    judge = {"url": server.url, "model": "j", "patience": 1}
    result = apo(*mixeval_command(data, tmp_path / "out", responses=folder, judge=judge))
    assert result.code == 3, result.err
    assert "Rate limit exceeded" in result.err
    assert not (tmp_path / "out" / "score.json").exists()


@pytest.mark.parametrize(("error", "reason"), API_ERRORS)
def test_an_error_of_the_models_server_is_no_wrong_answer(tmp_path, monkeypatch, server, error, reason):
    monkeypatch.setattr("clair.inference.client._FIRST_BACKOFF", 0.001)
    monkeypatch.setattr("clair.inference.rate_limit.PAUSE", 0.001)
    from tests.apo.evaluation.questions import FREE_FORM, MULTIPLE_CHOICE, accept, write_data

    free_form = [{**FREE_FORM[0], "prompt": f"<<{error}>>"}, *FREE_FORM[1:]]
    data = write_data(tmp_path / "data", {"free-form": free_form, "multiple-choice": MULTIPLE_CHOICE})
    accept(monkeypatch, data)
    model = {"url": server.url, "model": "t"}
    result = apo(*mixeval_command(data, tmp_path / "out", model=model, judge="rule"))
    assert result.code == 3
    assert reason in result.err
    score = tmp_path / "out" / "score.json"
    if error in ("HTTP400", "HTTP413"):  # about this very question: another run would end so again
        content = json.loads(score.read_text("utf-8"))
        assert (content["overall"], content["unanswered"]) == (None, 1)
        low, high = content["intervals"]["free_form"]["bracket"]
        assert high - low == pytest.approx(0.25)
        assert re.search(f"free-form +│ bracket │ {100 * low:.1f} to {100 * high:.1f} ", result.out)
        assert apo("eval", "show", tmp_path / "out").code == 0
    else:
        assert not score.exists()


# ---- the command


def test_the_command_scores_prints_and_resumes(data, responses, tmp_path, server):
    judge = {"url": server.url, "model": "j"}
    arguments = mixeval_command(data, tmp_path / "out", responses=responses, judge=judge)
    dry = apo(*arguments, "--dry-run")
    assert dry.code == 0
    assert "# 7 rows, 5 different questions, 7 answers" in dry.out
    assert not (tmp_path / "out").exists()
    result = apo(*arguments)
    assert result.code == 0, result.err
    assert "7 judgements from 5 requests; equal requests share a reply" in result.out
    assert apo("eval", "show", tmp_path / "out").code == 0
    assert server.paid() == 5


NOBODY = {"url": "http://127.0.0.1:9/v1", "model": "j"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the key 'judge' is missing"),
        ({"judge": "gpt"}, "judge"),
        ({"judge": "rule", "profile": "loose"}, "profile"),
        ({"judge": "rule", "samples": 2}, "samples are for a model that answers"),
        ({"judge": "rule", "model": {"path": "somewhere"}}, "either a model that answers or responses"),
        ({"judge": "rule", "independent_judgements": True}, "independent judgements are for a judge"),
        ({"judge": NOBODY | {"price": 1}}, "judge.price"),
        ({"judge": NOBODY, "budget": {"money": 1}}, "needs judge.price"),
        ({"judge": NOBODY}, "judge: cannot reach"),
        ({"judge": NOBODY | {"api_key_env": "NOT_SET"}}, "NOT_SET"),
        ({"judge": "rule", "judges": "rule"}, "unknown key 'judges'"),
    ],
)
def test_mistakes_are_one_line(data, responses, tmp_path, values, message):
    command = mixeval_command(data, tmp_path / "out", responses=responses, **values)
    assert message in error_line(apo(*command))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes one recipe, a YAML file, and none is named"),
        (["data/mixeval"], "takes one recipe, a YAML file, and found data/mixeval"),
        (["--datta", "d"], "unknown option --datta"),
        (
            ["--data", "d", "--judge-base-url", "http://127.0.0.1:9/v1", "--judge-model", "j", "--out", "o"],
            "write {data: d, judge: {url: 'http://127.0.0.1:9/v1', model: j}} into mixeval.yaml, "
            "then run apo eval mixeval mixeval.yaml",
        ),
        (["--data=d", "--judge", "rule", "--samples", "2"], "write {data: d, judge: rule, samples: 2} into"),
        (["--model-name", "m", "--upstream-files"], "write {model: {model: m}, upstream_files: true} into"),
    ],
)
def test_options_of_before_are_answered_with_the_recipe_to_write(arguments, message):
    assert message in error_line(apo("eval", "mixeval", *arguments))


def test_the_recipes_of_the_project_are_whole():
    recipes = ROOT / "recipes" / "evaluation"
    mixeval = load_recipe(MixEvalConfig, recipes / "mixeval_hard.yaml")
    assert set(mixeval.models) == {"model", "judge"}
    assert load_recipe(WinrateConfig, recipes / "winrate.yaml").judge.model == "gpt-4o"


def test_out_and_model_on_the_command_line_replace_the_recipes(data, responses, tmp_path):
    command = mixeval_command(data, tmp_path / "out", responses=responses, judge="rule")
    assert "is a file" in error_line(apo(*command, "--out", "/dev/null"))
    assert "either a model that answers" in error_line(apo(*command, "--model", "somewhere"))
    assert apo(*command, "--out", tmp_path / "other", "--set", "limit=1").code == 0
    assert len((tmp_path / "other" / "items.jsonl").read_text("utf-8").splitlines()) == 2


def test_a_folder_with_other_things_in_it_is_left_alone(data, responses, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"not empty \(it holds thesis\.tex\)"):
        evaluated(data, tmp_path / "out", responses=str(responses))


def test_a_budget_ends_the_run_and_a_larger_one_resumes(data, responses, tmp_path, server):
    options = {
        "responses": str(responses),
        "judge": {"url": server.url, "model": "j", "price": {"input": 0, "output": 1000}},
        "concurrency": 1,
    }
    result = evaluated(data, tmp_path / "out", **options, budget={"money": "1.005"})
    assert result.score is None
    assert result.stopped.startswith("budget reached")
    paid = server.paid()
    assert 0 < paid < 5
    result = evaluated(data, tmp_path / "out", **options, budget={"money": "20"})
    assert server.paid() == 5
    assert float(result.score.usage["judge"].cost) == pytest.approx(result.score.usage["judge"].completion / 1000)


def test_no_secret_is_written_or_printed(data, responses, tmp_path, server):
    url = server.url.replace("http://", "http://user:s3cr3t-pass@") + "?key=s3cr3t-too"
    arguments = mixeval_command(data, tmp_path / "out", responses=responses, judge={"url": url, "model": "j"})
    result = apo(*arguments)
    assert result.code == 0, result.err
    dry = apo(*arguments, "--dry-run")
    assert "s3cr3t" not in result.out + result.err + dry.out + dry.err
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) >= 4
    assert not [file for file in files if b"s3cr3t" in file.read_bytes()]


def test_upstreams_own_files_are_written_where_requested(data, tmp_path, server):
    folder = scripted(data, tmp_path / "gemma", ff1="[[0.3]]", mc0="[[B]]")
    judge = {"url": server.url, "model": "j"}
    score = evaluated(data, tmp_path / "out", responses=str(folder), judge=judge, upstream_files=True).score
    upstream = tmp_path / "out" / "upstream" / "gemma" / "mixeval_hard" / "2024-06-01"
    assert sorted(file.name for file in upstream.iterdir()) == [
        "gemma_close_freeform_hard.jsonl",
        "gemma_close_multichoice_hard.jsonl",
        "judge_results_ff_model_judge_j.jsonl",
        "judge_results_mp_model_judge_j.jsonl",
        "score.json",
    ]
    assert json.loads((upstream / "score.json").read_text())["overall score (final score)"] == score.overall
    judged = [json.loads(line) for line in (upstream / "judge_results_ff_model_judge_j.jsonl").read_text().splitlines()]
    assert [row["judge_score"] for row in judged] == [1.0, 0.3, 1.0, 1.0]
    # What it writes, it reads.
    again = evaluated(data, tmp_path / "again", responses=str(upstream), judge=judge)
    assert again.score.overall == score.overall


def test_items_are_counted_when_they_finish_and_not_in_order():
    class Uneven(MixEvalRun):
        def __post_init__(self) -> None:
            self.reported = asyncio.Event()

        async def _item(self, index):
            if index == 0:  # the first one ends after all others were reported
                await asyncio.wait_for(self.reported.wait(), 60)
            return SimpleNamespace(unresolved=None)

    async def counted() -> list[int]:
        run, counts = Uneven(None, None, {}, StopSignal()), []

        def on_progress(count: int, _: object) -> None:
            counts.append(count)
            if count == 3:
                run.reported.set()

        await run.items([(index, index) for index in range(4)], on_progress)
        return counts

    assert asyncio.run(counted()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("role", ["model", "judge"])
def test_a_batch_api_is_refused_before_any_request(tmp_path, role):
    batched = {"model": "m", "url": "http://127.0.0.1:1/v1", "batch": True}
    with pytest.raises(UserError, match=rf"{role}\.batch: an evaluation sends every request by itself"):
        config_for(
            tmp_path, tmp_path / "out", **{"model": {**batched, "batch": False}, "responses": None, role: batched}
        )
