"""Win rates: by pencil, against the embedded judge over HTTP, resumed without paying twice, refused where unfair."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from apo.evaluation.tables import winrate_table
from apo.evaluation.winrate.run import WinrateConfig, load_inputs, measure_win_rate
from apo.evaluation.winrate.verdicts import AnswerText, Comparison, summary
from clair.core.errors import UserError
from clair.core.recipe import resolve
from clair.data.records import Prompt
from recipes.world.judge import Leanings
from recipes.world.reviser import Misbehaviour
from recipes.world.running import Running, running
from recipes.world.server import ServerOptions
from recipes.world.tasks import Task, distinct_tasks
from tests.apo.evaluation.evaluating import apo, judging, write_recipe

ROOT = Path(__file__).parents[4]
TASKS = distinct_tasks("heldout", 40, seed=0)


@pytest.fixture(scope="module")
def world() -> Iterator[Running]:
    with running() as server:
        yield server


def answers(folder: Path, name: str, right: range, more: str = "", tasks: list[Task] = TASKS) -> Path:
    """A file of answers to the tasks, the right ones at these places."""
    rows = [
        {"prompt": task.prompt, "answer": (task.right if index in right else task.wrong) + (more if index % 2 else "")}
        for index, task in enumerate(tasks)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def winrate_command(folder: Path, url: str, judge: str) -> list[str | Path]:
    """`apo eval winrate` of base.jsonl and tuned.jsonl in `folder`, with a recipe there."""
    base, tuned = folder / "base.jsonl", folder / "tuned.jsonl"
    values = {"prompts": {"path": base}, "base": base, "tuned": tuned, "judge": {"url": url, "model": judge}}
    return ["eval", "winrate", write_recipe(folder / "winrate.yaml", out=folder / "out", **values)]


def settings(tmp_path: Path, url: str, **changes: object) -> WinrateConfig:
    values = {
        "prompts": {"path": str(tmp_path / "base.jsonl")},
        "base": str(tmp_path / "base.jsonl"),
        "tuned": str(tmp_path / "tuned.jsonl"),
        "judge": {"url": url, "model": "world-judge"},
        "out": str(tmp_path / "out"),
    } | changes
    return resolve(WinrateConfig, {key: value for key, value in values.items() if value is not None})


# ---- by pencil


def prompt(text: str) -> Prompt:
    return Prompt(text, ({"role": "user", "content": text},))


def compared(text: str, verdicts: tuple[str, str], lengths: tuple[int, int] = (10, 10), **more: object) -> Comparison:
    texts = [letter * count for letter, count in zip("bt", lengths, strict=True)]
    return Comparison(prompt(text), 0, AnswerText(texts[0]), AnswerText(texts[1]), verdicts, **more)


def test_the_summary_by_pencil():
    rows = [
        compared("a", ("tuned", "tuned"), (10, 20)),  # 1
        compared("b", ("base", "tuned"), (10, 30)),  # the judge likes the first: 1/2
        compared("c", ("tie", "tuned"), (20, 10)),  # 3/4
        compared("d", ("base", "base"), (10, 10)),  # 0
        Comparison(prompt("e"), 0, AnswerText("same"), AnswerText("same"), ("tie", "tie")),  # 1/2, nobody was asked
        Comparison(prompt("f"), 0, AnswerText("x"), AnswerText("y"), (None, None), unresolved="no_verdict"),
    ]
    result = summary(rows)
    assert (result["comparisons"], result["resolved"], result["identical"]) == (6, 5, 1)
    assert result["win_rate"]["mean"] == pytest.approx((1 + 0.5 + 0.75 + 0 + 0.5) / 5)
    assert (result["won"], result["tied"], result["lost"]) == (2, 2, 1)
    assert result["bracket"] == pytest.approx([2.75 / 6, 3.75 / 6])
    assert result["consistency"]["mean"] == pytest.approx(2 / 4)  # a and d, of the four that were asked
    assert result["length"]["ratio"] == pytest.approx((2 + 3 + 0.5 + 1 + 1) / 5)
    assert result["unresolved"] == {"no_verdict": 1}


@pytest.mark.parametrize(
    ("agreeing", "of", "reason"),
    [(2, 10, "in 20 % of the comparisons shown in both orders, no more than a coin does: this rate says nothing"),
     (100, 500, "use another judge"), (5, 10, "use another judge"), (6, 10, "too few to trust"), (10, 10, None),
     (60, 80, None)],
)  # fmt: skip
def test_a_judge_that_contradicts_itself_is_distrusted(agreeing, of, reason):
    rows = [compared(str(n), ("tuned", "tuned" if n < agreeing else "base")) for n in range(of)]
    distrust = summary(rows)["distrust"]
    assert distrust is None if reason is None else reason in distrust


def test_samples_of_one_prompt_are_one_cluster():
    values = [("tuned", "tuned"), ("base", "base")]
    configs_by_model = summary([compared(str(n), values[n // 2 % 2]) for n in range(40)])["win_rate"]
    together = summary([compared(str(n // 2), values[n // 2 % 2]) for n in range(40)])["win_rate"]
    assert together["se"] > 1.3 * configs_by_model["se"]
    alone = summary([compared("a", ("tuned", "tuned")), compared("a", ("tuned", "tie"))])
    assert (alone["win_rate"]["ci95"], alone["length_controlled"]["rate"]) == (None, None)


def test_a_rate_that_length_explains_falls_to_one_half_at_equal_lengths():
    longer = [compared(f"l{n}", ("tuned", "tuned") if n % 4 else ("base", "base"), (50, 200 + n)) for n in range(60)]
    shorter = [compared(f"s{n}", ("base", "base") if n % 4 else ("tuned", "tuned"), (200 + n, 50)) for n in range(20)]
    result = summary([*longer, *shorter])
    assert result["win_rate"]["mean"] == pytest.approx(50 / 80)
    lo, hi = result["length_controlled"]["ci95"]
    assert lo < 0.5 < hi
    assert result["length_controlled"]["rate"] == pytest.approx(0.5, abs=0.03)
    assert result["length_controlled"]["length"] > 1
    everywhere = summary([*longer[1:4], longer[5]])["length_controlled"]
    assert everywhere["rate"] is None
    assert "wins always" in everywhere["why"]


# ---- with a judge


def test_the_rate_of_known_answers_is_found(world, tmp_path):
    # Base right in 0..19, tuned in 10..34: the tuned one wins 15, loses 10, and the others say the same.
    answers(tmp_path, "base", range(20))
    answers(tmp_path, "tuned", range(10, 35))
    outcome = measure_win_rate(settings(tmp_path, world.url))
    assert outcome.stopped is None
    result = json.loads((tmp_path / "out" / "winrate.json").read_text("utf-8"))
    assert (result["won"], result["lost"], result["tied"], result["identical"]) == (15, 10, 15, 15)
    assert result["win_rate"]["mean"] == pytest.approx((15 + 7.5) / 40)
    assert result["win_rate"]["ci95"][0] < result["win_rate"]["mean"] < result["win_rate"]["ci95"][1]
    assert result["consistency"]["mean"] == 1
    assert result["position"]["first"] == result["position"]["second"] == 25
    assert result["usage"]["judge"]["calls"] == 50
    rows = [json.loads(line) for line in (tmp_path / "out" / "winrate.jsonl").read_text("utf-8").splitlines()]
    assert [row["value"] for row in rows[:12]] == [0] * 10 + [0.5] * 2
    assert rows[25]["base_first"] == rows[25]["tuned_first"] == "tuned"
    assert "solved the task" in rows[25]["base_first_reasoning"]


def test_equal_answers_of_several_samples_are_one_verdict_and_paid_for_once(world, tmp_path):
    results = {}
    for samples in (1, 4):
        folder = tmp_path / str(samples)
        folder.mkdir()
        for name, text in (("base", TASKS[0].wrong), ("tuned", TASKS[0].right)):
            row = json.dumps({"prompt": TASKS[0].prompt, "answer": text}) + "\n"
            (folder / f"{name}.jsonl").write_text(row * samples)
        results[samples] = measure_win_rate(settings(folder, world.url, samples=samples)).result
    assert (results[1]["comparisons"], results[4]["comparisons"]) == (1, 4)
    assert results[4]["position"] == results[1]["position"]
    used = [{key: result["usage"]["judge"][key] for key in ("prompt", "completion")} for result in results.values()]
    assert used[0] == used[1]
    assert used[0]["completion"] > 0


def test_prompts_with_tools_are_left_out_and_said(world, tmp_path):
    base = answers(tmp_path, "base", range(3), tasks=TASKS[:4])
    answers(tmp_path, "tuned", range(4), tasks=TASKS[:4])
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    rows = [json.loads(line) for line in base.read_text().splitlines()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"], "tools": [tool]}) + "\n" for row in rows[:2]))
    config = settings(tmp_path, world.url, prompts={"path": str(prompts)})
    with pytest.raises(UserError, match=r"no prompts to compare texts of \(2 left out: tools\)"):
        load_inputs(config)
    with open(prompts, "a") as file:
        file.writelines(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[2:])
    result = measure_win_rate(config).result
    assert result["left_out"] == {"tools": 2}
    table = io.StringIO()
    Console(file=table, width=120).print(winrate_table(result))
    assert "2 tools" in table.getvalue()


@pytest.mark.parametrize("file", ["https://host/answers.jsonl", "folder", "org/name"])
def test_answers_that_are_no_local_file_are_refused_before_any_verdict(world, tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    answers(tmp_path, "base", range(4))
    with pytest.raises(UserError, match=f"tuned: {file} is no file on this machine"):
        load_inputs(settings(tmp_path, world.url, tuned=file))


def test_answers_are_matched_by_prompt_and_not_by_index(world, tmp_path):
    answers(tmp_path, "base", range(20))
    file = answers(tmp_path, "tuned", range(10, 35))
    lines = file.read_text("utf-8").splitlines()
    file.write_text("".join(line + "\n" for line in reversed(lines)), "utf-8")
    assert measure_win_rate(settings(tmp_path, world.url)).result["won"] == 15


def test_a_ready_answer_is_compared_without_what_a_model_thought_before_it(world, tmp_path):
    file = answers(tmp_path, "base", range(20))
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    thought = [row | {"answer": f"<think>\nLet me see.\n</think>\n\n{row['answer']}<|im_end|>"} for row in rows]
    (tmp_path / "tuned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thought), "utf-8")
    result = measure_win_rate(settings(tmp_path, world.url)).result
    assert (result["identical"], result["usage"]["judge"]["calls"]) == (40, 0)


def test_a_judge_that_prefers_the_first_answer_moves_nothing_and_is_reported(tmp_path):
    answers(tmp_path, "base", range(20))
    answers(tmp_path, "tuned", range(20, 40))
    with running(ServerOptions(leanings=Leanings(position_bias=1.0))) as biased:
        result = measure_win_rate(settings(tmp_path, biased.url)).result
    assert result["win_rate"]["mean"] == 0.5
    assert result["consistency"]["mean"] == 0
    assert "agrees with itself in 0 %" in result["distrust"]
    assert result["position"]["share_first"] == 1
    assert result["position"]["biased"]


@pytest.mark.slow
def test_local_models_and_endpoints_answer(world, tmp_path):
    tasks = TASKS[:6]
    answers(tmp_path, "base", range(0), tasks=tasks)
    local = {"path": str(ROOT / "recipes/world/model"), "max_tokens": 40, "temperature": 0}
    served = {"url": world.url, "model": "world-target", "max_tokens": 40}
    result = measure_win_rate(settings(tmp_path, world.url, base=served, tuned=local, samples=2)).result
    assert (result["comparisons"], result["prompts"]) == (12, 6)
    assert result["tuned"]["identity"].startswith("weights:")
    assert result["base"]["name"] == "world-target"
    assert result["usage"]["tuned"]["completion"] > 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "winrate.jsonl").read_text("utf-8").splitlines()]
    assert [row["sample"] for row in rows] == [0, 1] * 6
    assert len({row["tuned"] for row in rows}) <= 6  # greedy: both samples are the same


def test_nothing_is_paid_for_twice(tmp_path):
    answers(tmp_path, "base", range(20))
    answers(tmp_path, "tuned", range(20, 40))
    with running() as server:
        stopped = measure_win_rate(settings(tmp_path, server.url, budget={"tokens": 20_000}, concurrency=4))
        assert "budget" in stopped.stopped
        assert stopped.result is None
        assert not (tmp_path / "out" / "winrate.json").exists()
        some = server.stats()["paid_total"]
        assert 0 < some < 80
        first = measure_win_rate(settings(tmp_path, server.url)).result
        again = measure_win_rate(settings(tmp_path, server.url)).result
        stats = server.stats()
    assert stats["paid_total"] == 80
    assert stats["paid_more_than_once"] == 0
    assert (first["usage"]["judge"]["calls"], again["usage"]["judge"]["calls"]) == (80 - some, 0)
    assert again["win_rate"] == first["win_rate"]


def test_verdicts_that_cannot_be_read_are_counted_and_bracketed(tmp_path):
    answers(tmp_path, "base", range(20))
    answers(tmp_path, "tuned", range(20, 40))
    judge = {"model": "world-judge", "ask_again": False}
    with running(ServerOptions(misbehaviour=Misbehaviour(refusal=0.3))) as server:
        result = measure_win_rate(settings(tmp_path, server.url, judge={"url": server.url, **judge})).result
    count = sum(result["unresolved"].values())
    assert 5 < count < 35
    assert result["resolved"] == 40 - count
    assert result["bracket"][1] - result["bracket"][0] == pytest.approx(count / 40)
    with running(ServerOptions(misbehaviour=Misbehaviour(refusal=1.0))) as server:
        config = settings(tmp_path, server.url, judge={"url": server.url, **judge}, out=str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"no comparison has a verdict: 40 \w+"):
            measure_win_rate(config)


def test_an_answer_that_was_cut_off_is_judged_and_counted(scripted_server, world, tmp_path):
    rows = [{"prompt": f"{task.prompt} [[length]]", "answer": task.right} for task in TASKS[:3]]
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    cut = {"url": scripted_server.url, "model": "m"}
    result = measure_win_rate(settings(tmp_path, world.url, tuned=cut)).result
    assert result["truncated"] == {"base": 0, "tuned": 3}
    assert result["resolved"] == 3
    assert result["bracket"] == [0, 1]


def test_an_answer_that_was_filtered_is_named_and_bracketed(tmp_path):
    won = "{teacher_reasoning}\nfirst\n\n{best_student_solution}\n[1]"
    rows = [{"prompt": f"{n} <<{text}>>", "answer": "mine"} for n, text in enumerate(("FILTER:no", won, won))]
    base = tmp_path / "base.jsonl"
    base.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with judging() as server:
        judge, tuned = {"url": server.url, "model": "j"}, {"url": server.url, "model": "t"}
        result = measure_win_rate(settings(tmp_path, server.url, judge=judge, tuned=tuned)).result
    assert (result["unresolved"], result["unanswered"]) == ({"answer_content_filter": 1}, 0)
    assert result["bracket"] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert result["win_rate"]["mean"] == 0.5


@pytest.fixture(scope="module")
def scripted_server():
    from tests.clair.building import scripted

    with scripted() as server:
        yield server


def test_an_endpoint_that_is_not_there_gives_no_rate_and_reports_it(scripted_server, tmp_path):
    answers(tmp_path, "base", range(20), tasks=TASKS[:2])
    answers(tmp_path, "tuned", range(0), tasks=TASKS[:2])
    rows = [{"prompt": "Say [[500]]", "answer": "a"}]
    (tmp_path / "base.jsonl").write_text(json.dumps(rows[0]) + "\n", "utf-8")
    failing = {"url": scripted_server.url, "model": "m"}
    result = measure_win_rate(settings(tmp_path, scripted_server.url, tuned=failing, attempts=2, judge={**failing}))
    assert (result.result, result.failed) == (None, 1)
    assert "500" in result.first_failure


@pytest.mark.parametrize(
    ("error", "reason"),
    [("HTTP402", "402"), ("HTTP413", "413"), ("BODY429", "Rate limit exceeded"), ("HTTP400", "400")],
)
def test_an_error_of_the_judges_server_is_no_win_rate_and_the_command_resumes(tmp_path, monkeypatch, error, reason):
    monkeypatch.setattr("clair.inference.client._FIRST_BACKOFF", 0.001)
    monkeypatch.setattr("clair.inference.rate_limit.PAUSE", 0.001)
    won = "{teacher_reasoning}\nlonger\n\n{best_student_solution}\n[2]"
    script = f"<<{'|'.join([error] * (6 if error == 'BODY429' else 1))}|{won}>>"
    rows = [{"prompt": f"Question {n}?", "answer": f"answer {n}"} for n in range(4)]
    base, tuned = tmp_path / "base.jsonl", tmp_path / "tuned.jsonl"
    base.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    changed = [{**row, "answer": script if n == 2 else f"<<{won}>> {n}"} for n, row in enumerate(rows)]
    tuned.write_text("".join(json.dumps(row) + "\n" for row in changed), "utf-8")
    result = tmp_path / "out" / "winrate.json"
    with judging() as server:
        arguments = winrate_command(tmp_path, server.url, "j")
        first = apo(*arguments)
        assert first.code == 3
        assert reason in first.err
        assert error == "HTTP402" or "there is no win rate" in first.err
        if result.exists():
            numbers = json.loads(result.read_text("utf-8"))
            assert (numbers["win_rate"], numbers["length_controlled"]["rate"]) == (None, None)
            assert numbers["bracket"] == [3 * 0.5 / 4, 3 * 0.5 / 4 + 0.25]
        again = apo(*arguments)
    assert again.code == 0, again.err
    assert json.loads(result.read_text("utf-8"))["win_rate"]["mean"] == 0.5


# ---- refused


def refuse(tmp_path: Path, match: str, **changes: object) -> None:
    with pytest.raises(UserError, match=match):
        load_inputs(settings(tmp_path, "http://127.0.0.1:9/v1", **changes))


def test_models_that_cannot_be_compared_are_refused_before_any_request(tmp_path):
    answers(tmp_path, "base", range(20))
    answers(tmp_path, "tuned", range(20), tasks=TASKS[:38])
    refuse(tmp_path, r"tuned: .*has not 1 answer\(s\) to 2 of 40 prompts; first: 0 to")
    refuse(tmp_path, r"base: .*has not 2 answer\(s\) to 40 of 40 prompts; first: 1 to", samples=2)
    refuse(tmp_path, "base and tuned are the same", tuned=str(tmp_path / "base.jsonl"))
    refuse(tmp_path, "model folder .* does not exist", tuned={"path": str(tmp_path / "nothing")})
    refuse(tmp_path, "needs both orders", judge={"url": "http://127.0.0.1:9/v1", "model": "j", "order": "random"})
    refuse(tmp_path, "needs the environment variable", judge={"url": "http://127.0.0.1:9/v1", "model": "j",
                                                              "api_key_env": "NO_SUCH_KEY"})  # fmt: skip
    twice = answers(tmp_path, "twice", range(20))
    twice.write_text(twice.read_text("utf-8") + json.dumps({"prompt": TASKS[0].prompt, "answer": "Another."}) + "\n")
    refuse(tmp_path, r"tuned: .*has not 1 answer\(s\) to 1 of 40 prompts; first: 2 to", tuned=str(twice))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    refuse(tmp_path, "is not a result folder and not empty")
    refuse(tmp_path, "s3://bucket/out is a URL, and this is written to local files only", out="s3://bucket/out")


def test_a_folder_is_not_mixed_with_another_comparison(world, tmp_path):
    answers(tmp_path, "base", range(20))
    answers(tmp_path, "tuned", range(10, 35))
    measure_win_rate(settings(tmp_path, world.url))
    answers(tmp_path, "third", range(5))
    with pytest.raises(UserError, match=r"other settings \(it differs in tuned"):
        measure_win_rate(settings(tmp_path, world.url, tuned=str(tmp_path / "third.jsonl")))


# ---- the command


def test_the_command_prints_rate_length_and_position(world, tmp_path):
    answers(tmp_path, "base", range(20))
    answers(tmp_path, "tuned", range(10, 35), more=" That is my answer.")
    arguments = winrate_command(tmp_path, world.url, "world-judge")
    plan = apo(*arguments, "--dry-run")
    assert plan.code == 0, plan.err
    assert "# 40 prompts, 40 pairs of answers, at most 80 verdicts" in plan.out
    assert not (tmp_path / "out").exists()
    result = apo(*arguments)
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "out" / "winrate.json").read_text("utf-8"))
    assert numbers["length"]["ratio"] > 1.1
    assert f"{100 * numbers['win_rate']['mean']:.1f}" in result.out
    assert f"{100 * numbers['length_controlled']['rate']:.1f}" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tuned", "http://127.0.0.1:9", "--tuned-name", "m"], "{tuned: {url: 'http://127.0.0.1:9', model: m}}"),
        (["--prompts", "p.jsonl", "--tuned", "b.jsonl"], "{prompts: {path: p.jsonl}, tuned: b.jsonl}"),
        (["--tuned", "."], "{tuned: {path: .}}"),
    ],
)
def test_options_of_before_are_answered_with_the_recipe_to_write(arguments, message):
    result = apo("eval", "winrate", *arguments)
    assert result.code == 2
    assert f"write {message} into winrate.yaml, then run apo eval winrate winrate.yaml" in result.err


def test_a_side_that_is_no_file_is_named(tmp_path):
    answers(tmp_path, "base", range(20))
    result = apo(*winrate_command(tmp_path, "http://127.0.0.1:9/v1", "j"), "--set", "tuned=nowhere")
    assert result.code == 2
    assert "nowhere" in result.err


# ---- AlpacaEval's answer files


def alpaca_file(folder: Path, name: str, right: range, **more: object) -> Path:
    rows = [
        {"instruction": task.prompt, "output": task.right if n in right else task.wrong, "generator": name, **more}
        for n, task in enumerate(TASKS)
    ]
    (folder / f"{name}.json").write_text(json.dumps(rows), "utf-8")
    return folder / f"{name}.json"


def test_answers_of_alpaca_eval_are_read_and_written(tmp_path, world):
    base, tuned = (
        alpaca_file(tmp_path, "gpt-x", range(10), dataset="helpful_base"),
        alpaca_file(tmp_path, "m", range(30)),
    )
    files = {"prompts": {"path": str(base)}, "base": str(base), "tuned": str(tuned)}
    result = measure_win_rate(settings(tmp_path, world.url, **files)).result
    assert result is not None
    assert (result["base"]["name"], result["tuned"]["name"]) == ("gpt-x", "m")
    assert result["win_rate"]["mean"] == pytest.approx((10 * 0.5 + 20 + 10 * 0.5) / 40)
    written = json.loads((tmp_path / "out/tuned.json").read_text())
    assert written == [
        {key: row[key] for key in ("instruction", "output", "generator")} for row in json.loads(tuned.read_text())
    ]
    # What was written is an answer file again, as for a comparison of another model with the same answers.
    files = {**files, "base": str(tmp_path / "out/base.json"), "tuned": str(tmp_path / "out/tuned.json")}
    again = measure_win_rate(settings(tmp_path, world.url, **files, out=str(tmp_path / "again"))).result
    assert again is not None
    assert again["win_rate"] == result["win_rate"]
    assert again["base"]["name"] == "gpt-x"


def test_an_empty_output_is_an_answer_and_answers_of_two_models_are_none(tmp_path, world):
    base, tuned = alpaca_file(tmp_path, "a", range(10)), alpaca_file(tmp_path, "b", range(30))
    rows = json.loads(tuned.read_text())
    rows[0]["output"] = ""
    tuned.write_text(json.dumps(rows))
    files = {"prompts": {"path": str(base)}, "base": str(base), "tuned": str(tuned)}
    inputs = load_inputs(settings(tmp_path, world.url, **files))
    assert next(iter(inputs.ready_answers["tuned"].values())) == [""]
    rows[1]["generator"] = "c"
    tuned.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="answers of several models, 'b', 'c'"):
        load_inputs(settings(tmp_path, world.url, **files))


def test_conversations_and_several_answers_are_not_written_as_answers_of_alpaca_eval(tmp_path, world):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    for name in ("base", "tuned"):
        row = {"prompt": [*turns, {"role": "user", "content": TASKS[0].prompt}], "answer": f"{name} says 3"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert measure_win_rate(settings(tmp_path, world.url)).result is not None
    assert not (tmp_path / "out/base.json").exists()
