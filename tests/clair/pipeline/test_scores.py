"""Pairs from scores: checkers that misbehave, which two answers become a pair, and what the outputs say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clair.cluster.merge import merge
from clair.core.errors import UserError
from clair.core.recipe import load_recipe
from clair.data.dataset import read_manifest, read_rows
from clair.data.records import Dropped
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig, ScoresConfig
from clair.pipeline.estimate import estimate
from clair.pipeline.export import next_round
from clair.pipeline.scores import Scoring, agreement
from clair.pipeline.shards import Shard, shard_config, shards_location
from recipes.world.running import running
from tests.clair import tiny_model
from tests.clair.building import ROOT, clair, drops, error_line, final_bytes, write_prompts, write_recipe
from tests.clair.scripted import Scripted, between, endpoint, install, recipe

PROGRAM = [sys.executable, str(ROOT / "tests/clair/checker_program.py")]


def checker(starts=None, **options):
    command = [*PROGRAM, *([str(starts)] if starts else [])]
    return {"checker": {"command": command, "seconds": 20, "processes": 1, **options}}


def rows(*answers):
    """One row for each list of answers."""
    return [{"id": f"r{n}", "prompt": f"question {n}", "answers": list(texts)} for n, texts in enumerate(answers)]


def reasons(out):
    return {row["id"]: f"{row['stage']}.{row['reason']}" for row in drops(out)}


def scores(out):
    return {row["id"]: (row["score_chosen"], row["score_rejected"]) for row in read_rows(out)}


# ---- checkers


def test_a_checker_scores_the_answers_of_several_models_and_the_pair_names_their_authors(tmp_path, monkeypatch):
    install(
        monkeypatch,
        target=Scripted("small", lambda m, n: "ab" * (n + 1)),
        candidate_1=Scripted("large", lambda m, n: "abcdefgh" * (n + 1)),
    )
    models = {"target": endpoint(), "candidates": [endpoint(model="large")]}
    built = build(recipe(tmp_path / "out", [{"id": "r", "prompt": "q"}], pipeline="judged", **models, scores=checker()))
    (row,) = read_rows(tmp_path / "out")
    assert row["models"] == {"chosen": "large", "rejected": "small"}
    assert (row["score_chosen"], row["score_rejected"]) == (16.0, 2.0)
    assert {role: tokens["calls"] for role, tokens in built.manifest["tokens"].items()} == {
        "target": 2,
        "candidate_1": 2,
    }


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("crash", "crashed"),
        ("die", "crashed"),
        ("memory", "crashed"),
        ("nan", "nan"),
        ("null", "nan"),
        ("infinite", "nan"),
        ("words", "unreadable"),
        ("short", "unreadable"),
        ("other", "unreadable"),
        ("chatty", "unreadable"),
    ],
)
def test_a_checker_that_misbehaves_is_a_counted_reason_and_the_other_rows_get_their_scores(tmp_path, answer, reason):
    given = rows(["good", "bad"], [answer, "bad"], ["better", "bad"])
    starts = tmp_path / "starts"
    config = recipe(tmp_path / "out", given, pipeline="judged", scores=checker(starts, megabytes=1000))
    built = build(config)
    assert reasons(tmp_path / "out") == {"r1": f"checker.{reason}"}
    assert scores(tmp_path / "out") == {"r0": (4.0, 3.0), "r2": (6.0, 3.0)}
    assert built.failed == 0
    assert len(starts.read_text().split()) == 3  # the trial, the first, and the one after it was killed


def test_a_checker_that_hangs_is_killed_with_its_children_and_the_build_goes_on(tmp_path):
    starts = tmp_path / "starts"
    given = rows(["hang", "bad"], ["good", "bad"])
    config = recipe(tmp_path / "out", given, pipeline="judged", scores=checker(starts, seconds=3))
    build(config)
    assert reasons(tmp_path / "out") == {"r0": "checker.timeout"}
    assert scores(tmp_path / "out") == {"r1": (4.0, 3.0)}
    _, hung, _ = map(int, starts.read_text().split())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and members(hung):
        time.sleep(0.1)
    assert not members(hung)


def members(group: int) -> list[str]:
    """The live processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = stat.read_text().rpartition(")")
        except OSError:
            continue
        if int(fields.split()[2]) == group and fields.split()[0] != "Z":
            found.append(name)
    return found


def test_a_second_line_is_never_taken_for_the_scores_of_the_next_row(tmp_path):
    given = rows(["twice", "bad"], ["good", "bad"], ["better", "bad"])
    build(recipe(tmp_path / "out", given, pipeline="judged", scores=checker()))
    assert reasons(tmp_path / "out") == {"r1": "checker.unreadable"}
    assert scores(tmp_path / "out") == {"r0": (5.0, 3.0), "r2": (6.0, 3.0)}


def test_a_checker_gets_the_reference_and_a_further_round_keeps_it(tmp_path):
    given = [{"prompt": "2 + 2?", "answers": ["reference 4", "reference 5"], "key": "4"}]
    prompts = {"path": str(write_prompts(tmp_path / "p.jsonl", given)), "columns": {"reference": "key"}}
    config = {"pipeline": "judged", "prompts": prompts, "scores": checker(), "out": str(tmp_path / "out")}
    build(BuildConfig.model_validate(config))
    assert list(scores(tmp_path / "out").values()) == [(1.0, 0.0)]
    next_round(tmp_path / "out", "models/tuned", tmp_path / "second")
    (row,) = map(json.loads, (tmp_path / "second-prompts.jsonl").read_text().splitlines())
    assert row["reference"] == "4"
    assert yaml.safe_load((tmp_path / "second.yaml").read_text())["prompts"]["columns"] == {"reference": "reference"}
    given[0]["key"] = "5"
    write_prompts(tmp_path / "p.jsonl", given)
    again = build(BuildConfig.model_validate(config), update=True)
    assert scores(tmp_path / "out")
    assert again.manifest["prompts_sha256"]


def test_a_changed_checker_needs_update_and_pays_for_no_answer_again(tmp_path, monkeypatch):
    program = tmp_path / "check.py"
    program.write_text(Path(PROGRAM[1]).read_text())
    install(monkeypatch, target=Scripted("t", lambda m, n: "x" * (n + 1)))
    scored = {"checker": {"command": [sys.executable, str(program)]}}
    config = recipe(tmp_path / "out", [{"prompt": "q"}], pipeline="judged", target=endpoint(), scores=scored)
    build(config)
    program.write_text(program.read_text().replace("len(answer))", "-len(answer))"))
    with pytest.raises(UserError, match=r"scores\.scorer_sha256"):
        build(config)
    again = build(config, update=True)
    assert list(scores(tmp_path / "out").values()) == [(-1.0, -2.0)]
    assert again.manifest["tokens"]["target"]["calls"] == 0


# ---- which two become a pair


def chosen(values, **config):
    """The indices of winner and loser, or the reason for none."""
    try:
        return Scoring(ScoresConfig.model_validate(config)).choose(values)
    except Dropped as dropped:
        return f"{dropped.stage}.{dropped.reason}"


@pytest.mark.parametrize(
    ("values", "config", "result"),
    [
        ([3, 9, 1, 5], {}, (1, 2)),
        ([3, 9, 1, 5], {"floor": 9}, (1, 2)),
        ([3, 9, 1, 5], {"floor": 9.5}, "scores.floor"),
        ([3, 9, 1, 5], {"margin": {"least": 2, "most": 5}}, (1, 3)),
        ([3, 9, 1, 5], {"margin": {"least": 1, "most": 3}}, (3, 0)),
        ([3, 9, 1, 5], {"margin": {"least": 1, "most": 3}, "floor": 6}, "scores.margin"),
        ([3, 9, 1, 5], {"margin": {"least": 9}}, "scores.margin"),
        ([9, 4, 4], {"margin": {"most": 3}}, "scores.margin"),
        ([1, 0, 0], {"margin": {"most": 0.5}}, "scores.margin"),
        ([9, 4, 4, 3], {"margin": {"most": 3}}, (1, 3)),
        ([5, 5, 5], {}, "scores.tie"),
        ([5, 5, 5], {"leave_out_flat": True}, "scores.flat"),
        ([5, 5.1, 5], {"flat": 0.2}, (1, 0)),
        ([5, 5.1, 5], {"flat": 0.2, "leave_out_flat": True}, "scores.flat"),
        ([5, float("nan")], {"leave_out_flat": True}, "scores.missing"),
    ],
)
def test_scores_choose_a_pair_or_a_reason(values, config, result):
    assert chosen(values, **config) == result


def test_given_scores_get_the_floor_too_and_flat_prompts_are_counted(tmp_path):
    given = [
        {"id": "high", "prompt": "a", "answers": ["x", "y"], "scores": [8, 2]},
        {"id": "low", "prompt": "b", "answers": ["x", "y"], "scores": [3, 2]},
        {"id": "flat", "prompt": "c", "answers": ["x", "y"], "scores": [9, 8.9]},
    ]
    limits = {"floor": 5, "flat": 0.1}
    built = build(recipe(tmp_path / "out", given, pipeline="judged", scores=limits))
    assert set(scores(tmp_path / "out")) == {"high", "flat"}
    assert reasons(tmp_path / "out") == {"low": "scores.floor"}
    assert built.manifest["scores"] == {"prompts": 3, "flat": 1, "agreement": []}
    assert "scores hardly vary for 1 of 3 prompts" in (built.out / "README.md").read_text("utf-8")


# ---- judges


def score_by_length(offset=0, wrong=()):
    """A judge that gives a point a character; it turns the order of the answers of some prompts."""

    def script(messages, sample):
        task, answer = (between(messages[0]["content"], tag) for tag in ("task", "student_solution"))
        points = len(answer) + offset
        return "{teacher_reasoning}\nhm\n\n{student_solution_score}\n" + str(10 - points if task in wrong else points)

    return script


def judges(tmp_path, monkeypatch, name="out", **keys):
    """Build from ready answers and two judges, of which the second turns the order of one prompt in ten."""
    first = Scripted("first", score_by_length())
    second = Scripted("second", score_by_length(1, wrong={"question 0", "question 10"}))
    install(monkeypatch, judge_1=first, judge_2=second)
    given = rows(*(["abc", "a", "abcdef"] for _ in range(20)))
    scored = {"judges": [endpoint(), endpoint(model="other")], **keys}
    return recipe(tmp_path / name, given, pipeline="judged", scores=scored), (first, second)


def test_two_judges_score_each_answer_by_itself_and_their_agreement_is_told(tmp_path, monkeypatch):
    config, models = judges(tmp_path, monkeypatch, rubric="Length is everything.")
    built = build(config)
    # Both give 6 and 7 to the longest answer and 1 and 2 to the shortest; the turned prompts tie in the mean.
    assert set(scores(built.out).values()) == {(6.5, 1.5)}
    assert reasons(built.out) == {"r0": "scores.tie", "r10": "scores.tie"}
    assert all("Length is everything." in r["messages"][0]["content"] for model in models for r in model.requests)
    assert all(len(model.requests) == 60 for model in models)
    (entry,) = built.manifest["scores"]["agreement"]
    assert (entry["judges"], entry["prompts"], entry["share"]) == (["first", "second"], 20, pytest.approx(0.9))
    assert entry["ci95"][0] < 0.9 < entry["ci95"][1]
    for text in ((built.out / "README.md").read_text("utf-8"), clair("stats", built.out).out.replace("\n", " ")):
        assert "agree" in text
    clair("report", built.out)
    assert "first and second agree on the order of 90.0%" in (built.out / "report.html").read_text("utf-8")


def test_shards_of_scores_merge_to_the_bytes_and_counts_of_a_single_run(tmp_path, monkeypatch):
    config, _ = judges(tmp_path, monkeypatch)
    build(config)
    config, _ = judges(tmp_path, monkeypatch, "parts")
    for index in (1, 2):
        build(config, shard=Shard(index, 2))
    merge(shards_location(config.out))
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "out")
    assert read_manifest(tmp_path / "parts")["scores"] == read_manifest(tmp_path / "out")["scores"]


def test_a_shard_has_its_share_of_the_rates_of_every_model(tmp_path):
    models = {"target": endpoint(), "candidates": [endpoint(requests_per_minute=100)]}
    scored = {"judges": [endpoint(tokens_per_minute=1000)]}
    config = recipe(tmp_path / "out", [{"prompt": "q"}], pipeline="judged", **models, scores=scored)
    part = shard_config(config, Shard(1, 4)).models
    assert (part["candidate_1"].requests_per_minute, part["judge"].tokens_per_minute) == (25, 250)
    assert shard_config(config, Shard(1, 4)).judge is None


def test_a_score_that_cannot_be_read_is_requested_again_and_then_drops_the_row(tmp_path, monkeypatch):
    replies = iter(["8 and a half", "{teacher_reasoning}\nx\n\n{student_solution_score}\n11", "no", "no", "no", "no"])
    install(monkeypatch, judge=Scripted("vague", lambda m, n: next(replies)))
    build(recipe(tmp_path / "out", rows(["a", "b"]), pipeline="judged", scores={"judges": [endpoint()]}))
    assert set(reasons(tmp_path / "out").values()) <= {"judge.no_score", "judge.no_label"}


def test_agreement_counts_orders_and_a_single_tie_as_half():
    assert agreement([1, 2, 3], [10, 20, 30]) == 1
    assert agreement([1, 2], [2, 1]) == 0
    assert agreement([1, 2], [5, 5]) == 0.5
    assert agreement([1, 1], [5, 5]) is None


def test_an_estimate_counts_the_scores_of_every_judge_with_a_repetition(tmp_path):
    models = {"target": endpoint(), "candidates": [endpoint(model="a")], "samples": 3}
    scored = {"judges": [endpoint(), endpoint(model="b", ask_again=False)]}
    calls = estimate(recipe(tmp_path / "out", [{"prompt": "q"}], pipeline="judged", **models, scores=scored))
    assert {role: count.max_calls for role, count in calls.items()} == {
        "target": 3,
        "candidate_1": 3,
        "judge_1": 12,
        "judge_2": 6,
    }


# ---- a reward model


def save_reward(folder, labels=1):
    """A tiny classifier on Llama, saved as transformers saves it. Returns the model."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=32, max_position_embeddings=24, num_labels=labels)
    config.architectures = ["LlamaForSequenceClassification"]
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tiny_model.make_tokenizer().save_pretrained(folder)
    return model


def test_a_sequence_classifier_gives_each_answer_the_score_that_transformers_gives(tmp_path):
    import torch

    model = save_reward(tmp_path / "reward")
    answers = ["one two", "seven", "ten nine eight"]
    given = [{"id": "r", "prompt": "what is this", "answers": answers}]
    given.append({"id": "long", "prompt": "what is this", "answers": ["one", "two " * 30]})
    config = recipe(tmp_path / "out", given, pipeline="judged", scores={"reward": {"path": str(tmp_path / "reward")}})
    build(config)
    tokenizer = tiny_model.make_tokenizer()
    expected = {}
    for answer in answers:
        turns = [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected[answer] = float(model(ids).logits[0, 0])
    (row,) = read_rows(tmp_path / "out")
    assert row["chosen"][0]["content"] == max(expected, key=expected.__getitem__)
    assert row["score_chosen"] == pytest.approx(max(expected.values()), abs=1e-6)
    assert row["score_rejected"] == pytest.approx(min(expected.values()), abs=1e-6)
    assert reasons(tmp_path / "out") == {"long": "reward.too_long"}


def test_a_classifier_of_several_classes_scores_by_the_probability_of_one(tmp_path):
    save_reward(tmp_path / "reward", labels=2)
    given = rows(["one two", "seven"])
    reward = {"path": str(tmp_path / "reward")}
    with pytest.raises(UserError, match=r"has 2 classes; .* one of LABEL_0, LABEL_1"):
        build(recipe(tmp_path / "a", given, pipeline="judged", scores={"reward": reward}))
    with pytest.raises(UserError, match="unknown class 'LABEL_7'"):
        build(recipe(tmp_path / "b", given, pipeline="judged", scores={"reward": reward | {"label": "LABEL_7"}}))
    build(recipe(tmp_path / "out", given, pipeline="judged", scores={"reward": reward | {"label": "LABEL_1"}}))
    assert all(0 < score < 1 for pair in scores(tmp_path / "out").values() for score in pair)


def test_a_model_that_gives_no_scores_is_no_reward(tmp_path):
    tiny_model.save(tmp_path / "chat")
    with pytest.raises(UserError, match="LlamaForCausalLM, which gives no scores"):
        build(
            recipe(
                tmp_path / "out",
                rows(["a", "b"]),
                pipeline="judged",
                scores={"reward": {"path": str(tmp_path / "chat")}},
            )
        )


# ---- mistakes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": {"checker": {"command": ["no-such-program"]}}}, "there is no program 'no-such-program'"),
        ({"scores": {"checker": {"command": []}}}, "scores.checker.command: .*at least 1"),
        ({"scores": {"checker": {"command": [sys.executable, "-c", "import no_such"]}}}, "1 .* ModuleNotFoundError"),
        ({"scores": {"checker": {"command": ["sleep", "60"], "seconds": 0.2}}}, "does not end within 0.2 s"),
        ({"scores": {"checker": {"command": PROGRAM}, "judges": [endpoint()]}}, "checker and judges both give scores"),
        ({"scores": {"floor": 2}}, "have no scores and the recipe has no judge"),
        ({"scores": {"rubric": "Be kind.", "floor": 1}}, "rubric is for judges"),
        ({"scores": {"judges": [endpoint()], "scale": [5, 5]}}, "lowest to the highest"),
        ({"scores": {"judges": [endpoint(), endpoint()]}}, "judge 2 is the same as an earlier one"),
        ({"scores": {"margin": {"least": 3, "most": 1}}}, "no margin lies between"),
        ({"scores": {"floor": 2}, "judge": endpoint()}, "judge compares two answers"),
        ({"scores": {"flor": 2}}, "unknown key 'scores.flor' .did you mean 'floor'"),
        ({"candidates": [endpoint()]}, "there is no target"),
        ({"target": endpoint(), "samples": 1}, "samples: 1 of one model"),
        ({"pipeline": "revised", "reviser": endpoint(), "scores": {"floor": 2}}, "scores is not used by the pipeline"),
        ({"scores": {"reward": {"path": "no-such-folder"}}}, "holds no config.json"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_request(tmp_path, changes, match):
    write_prompts(tmp_path / "prompts.jsonl", rows(["a", "b"]))
    path = write_recipe(tmp_path, "http://127.0.0.1:9/v1", **({"pipeline": "judged", "reviser": None} | changes))
    assert re.search(match, error_line(clair("build", path)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pairs"), [("checker", 280), ("judges", 226), ("reward", 280)])
def test_a_recipe_on_the_world_gives_its_expected_numbers_on_a_real_server(tmp_path, name, pairs):
    prompts = tmp_path / "prompts.jsonl"
    command = [sys.executable, "-m", "recipes.world.tasks", "--split", "train", "--count", "300", "--out", str(prompts)]
    subprocess.run(command, check=True, cwd=ROOT)
    text = (ROOT / f"recipes/scores/{name}.yaml").read_text("utf-8")
    with running() as server:
        (tmp_path / "recipe.yaml").write_text(text.replace("http://127.0.0.1:8399/v1", server.url))
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        overrides = [f"prompts.path={prompts}", f"out={tmp_path / 'pairs'}"]
        if name == "reward":
            from recipes.world.make_reward import make_reward

            make_reward(tmp_path / "model", steps=5)
            overrides.append(f"scores.reward.path={tmp_path / 'model'}")
        built = build(load_recipe(BuildConfig, tmp_path / "recipe.yaml", overrides))
    assert built.manifest["counts"]["pairs"] == pairs
