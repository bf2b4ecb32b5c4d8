"""Builds from end to end over HTTP, against the embedded world: what comes out, what is paid, what is paid again."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import yaml

from clair.core.errors import UserError
from clair.data.dataset import assign_split, read_rows
from clair.pipeline.build import build
from recipes.world.reviser import ALLUSION, Misbehaviour
from recipes.world.running import Running, running
from recipes.world.server import ServerOptions
from recipes.world.tasks import distinct_tasks, is_right, solve, write_prompts
from tests.clair import building
from tests.clair.building import clair, config_for, drops, final_bytes, manifest, outcomes, pairs, write_recipe

COUNT = 60


@pytest.fixture(scope="module")
def world() -> Iterator[Running]:
    """An endpoint that behaves."""
    with running(ServerOptions()) as server:
        yield server


def roles(url: str, **reviser: object) -> dict:
    """A target that answers and a reviser that revises, both on one server."""
    return {
        "target": {"url": url, "model": "world-target", "temperature": 0.6},
        "reviser": {"url": url, "model": "world-reviser", "temperature": 0.7, **reviser},
    }


def world_config(tmp_path: Path, url: str, **changes: object):
    return config_for(tmp_path, url, **roles(url) | changes)


def write_tasks(tmp_path: Path, count: int = COUNT, *, answers: bool = False, seed: int = 0) -> list:
    tasks = distinct_tasks("train", count, seed)
    write_prompts(tmp_path / "prompts.jsonl", tasks, answers_seed=0 if answers else None)
    return tasks


def paid(server: Running) -> int:
    return server.stats()["paid_total"]


# ---- what comes out


@pytest.fixture(scope="module")
def built(tmp_path_factory, world) -> Path:
    """A folder built from 60 tasks; the reviser changes nothing where the target was right."""
    tmp_path = tmp_path_factory.mktemp("built")
    write_tasks(tmp_path)
    recipe = write_recipe(tmp_path, world.url, **roles(world.url), test_fraction=0.2, concurrency=8)
    result = clair("build", recipe)
    assert result.code == 0, result
    assert f"{tmp_path / 'out'}/README.md describes it" in result.out.replace("\n", "")
    return tmp_path / "out"


def test_counts_add_up_and_every_prompt_has_one_outcome(built):
    counts = manifest(built)["counts"]
    by_prompt = outcomes(built)
    assert counts["prompts"] == counts["pairs"] + counts["dropped"] == COUNT == len(by_prompt)
    assert counts["train"] + counts["test"] == counts["pairs"] == len(pairs(built))
    assert counts["dropped"] == len(drops(built))
    assert counts["pairs"] > 15
    assert manifest(built)["drop_reasons"] == {"filter.identical": counts["dropped"]}
    assert manifest(built)["failed"] == 0


def test_every_pair_is_the_targets_wrong_answer_and_its_minimal_correction(built):
    for row in pairs(built):
        (prompt,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        assert prompt["role"] == "user"
        assert chosen["role"] == rejected["role"] == "assistant"
        task = solve(prompt["content"])
        assert row["id"] == task.id
        assert is_right(task, chosen["content"])
        assert not is_right(task, rejected["content"])
        assert row["contrast"]["kept"] > 0.5
        assert row["reasoning"]
        assert row["models"] == {"chosen": "world-reviser", "rejected": "world-target"}


def test_rows_stand_in_the_order_of_the_prompts(built):
    order = [json.loads(line)["id"] for line in (built.parent / "prompts.jsonl").read_text().splitlines()]
    for split in ("train", "test"):
        ids = [row["id"] for row in read_rows(built, [split])]
        assert ids == [id for id in order if id in set(ids)]
        assert all(assign_split(id, 0, 0.2) == split for id in ids)
    dropped = [row["id"] for row in drops(built)]
    assert dropped == [id for id in order if id in set(dropped)]


def test_load_dataset_reads_the_folder_as_it_is(built):
    loaded = datasets.load_dataset(str(built))
    counts = manifest(built)["counts"]
    assert {name: len(split) for name, split in loaded.items()} == {n: counts[n] for n in ("train", "test")}
    assert loaded["train"][0] == pairs(built)[0]
    optional = ["score_chosen", "score_rejected", "user", "group", "behaviour", "source"]
    always = ["id", "prompt", "chosen", "rejected", "reasoning", "models", "contrast"]
    assert loaded["train"].column_names == always + optional


def test_the_manifest_names_what_made_the_data(built):
    content = manifest(built)
    assert content["pipeline"] == "revised"
    assert content["seed"] == 0
    assert content["models"]["reviser"]["model"] == "world-reviser"
    assert content["sampling"] == {
        "target": {"temperature": 0.6, "max_tokens": 512},
        "reviser": {"temperature": 0.7, "max_tokens": 4096},
    }
    assert content["tokens"]["reviser"]["calls"] == COUNT
    assert content["tokens"]["reviser"]["prompt"] > content["tokens"]["target"]["prompt"] > 0
    assert content["recipe"]["test_fraction"] == 0.2
    assert content["versions"]["datasets"] == datasets.__version__
    assert set(content) >= {"git_commit", "python", "seconds", "prompts_sha256"}
    for name, sha in content["files"].items():
        assert hashlib.sha256((built / name).read_bytes()).hexdigest() == sha
    assert content["contrast"].keys() == {"jaccard", "levenshtein", "kept", "prefix", "length_ratio"}
    assert 0 < content["contrast"]["jaccard"] < 1


def test_the_card_has_front_matter_and_counts(built):
    _, front, text = (built / "README.md").read_text("utf-8").split("---\n", 2)
    files = yaml.safe_load(front)["configs"][0]["data_files"]
    assert files == [{"split": s, "path": f"data/{s}-*.parquet"} for s in ("train", "test")]
    counts = manifest(built)["counts"]
    assert f"{counts['pairs']} pairs ({counts['train']} train, {counts['test']} test) from {COUNT} prompts" in text
    assert f"filter.identical: {counts['dropped']}" in text


def test_dropped_rows_have_stage_reason_and_detail(built):
    for row in drops(built):
        assert row == {
            "id": row["id"],
            "stage": "filter",
            "reason": "identical",
            "detail": "chosen and rejected are the same",
            "failed": False,
        }


def test_nothing_else_lies_in_the_folder(built):
    names = {str(file.relative_to(built)) for file in built.rglob("*") if file.is_file()}
    assert names == {
        *building.SPLIT_FILES,
        "dropped.jsonl",
        "manifest.json",
        "README.md",
        "recipe.json",
        "ledger.sqlite",
        ".lock",
    }


def test_trl_reads_the_pairs_as_they_are(built):
    from trl.data_utils import is_conversational, maybe_extract_prompt

    row = datasets.load_dataset(str(built), split="train")[0]
    assert is_conversational(row)
    assert maybe_extract_prompt(dict(row)) == row  # the prompt is explicit already


def test_stats_and_show_describe_the_folder(built):
    stats = clair("stats", built)
    assert stats.code == 0
    counts = manifest(built)["counts"]
    assert f"{counts['pairs']} ({counts['train']} train, {counts['test']} test)" in stats.out
    shown = clair("show", built, "-n", "2")
    assert shown.code == 0
    assert shown.out.count(pairs(built)[0]["id"]) == 1


# ---- what is paid, and what is not paid again


def test_a_second_run_costs_nothing_and_writes_the_same(tmp_path, world):
    write_tasks(tmp_path)
    config = world_config(tmp_path, world.url)
    build(config)
    first, cost = final_bytes(tmp_path / "out"), paid(world)
    again = build(config)
    assert paid(world) == cost
    assert final_bytes(tmp_path / "out") == first
    assert {role: (t["calls"], t["reused"]) for role, t in again.manifest["tokens"].items()} == {
        "target": (0, COUNT),
        "reviser": (0, COUNT),
    }


def test_a_run_that_finds_everything_needs_no_endpoint(tmp_path):
    write_tasks(tmp_path)
    with running(ServerOptions()) as server:
        config = world_config(tmp_path, server.url)
        build(config)
    first = final_bytes(tmp_path / "out")
    build(config)
    assert final_bytes(tmp_path / "out") == first


def test_adding_prompts_requests_only_the_new_ones(tmp_path, world):
    write_tasks(tmp_path, 40)
    build(world_config(tmp_path, world.url))
    cost = paid(world)
    write_tasks(tmp_path, 50)
    more = build(world_config(tmp_path, world.url))
    assert paid(world) - cost == 2 * 10
    assert more.manifest["counts"]["prompts"] == 50


def test_changing_a_reviser_option_repeats_the_revisers_requests_and_not_the_targets(tmp_path, world):
    write_tasks(tmp_path)
    build(world_config(tmp_path, world.url))
    cost = paid(world)
    changed = world_config(tmp_path, world.url, **roles(world.url, max_tokens=4000))
    with pytest.raises(UserError, match=r"another recipe \(it differs in reviser.max_tokens\).*--update"):
        build(changed)
    assert paid(world) == cost
    again = build(changed, update=True)
    assert paid(world) - cost == COUNT
    assert again.manifest["tokens"]["target"]["calls"] == 0


def test_changing_a_filter_requests_nothing(tmp_path, world):
    write_tasks(tmp_path)
    build(world_config(tmp_path, world.url))
    cost = paid(world)
    unfiltered = build(world_config(tmp_path, world.url, filters={"identical": False}), update=True)
    assert paid(world) == cost
    assert unfiltered.manifest["counts"]["pairs"] == COUNT


def test_changing_the_template_repeats_the_revisers_requests(tmp_path, world):
    write_tasks(tmp_path, 10)
    build(world_config(tmp_path, world.url))
    cost = paid(world)
    template = tmp_path / "own.j2"
    template.write_text("Please:\n<task>\n{{ task }}\n</task>\n<student_solution>\n{{ answer }}\n</student_solution>")
    build(world_config(tmp_path, world.url, **roles(world.url, template=str(template))), update=True)
    assert paid(world) - cost == 10


def test_the_rate_of_requests_is_no_change_of_the_recipe(tmp_path, world):
    write_tasks(tmp_path, 10)
    build(world_config(tmp_path, world.url))
    cost = paid(world)
    build(world_config(tmp_path, world.url, concurrency=3, attempts=2, **roles(world.url, timeout=5.0)))
    assert paid(world) == cost


def test_another_seed_makes_another_split_and_requests_nothing_of_an_endpoint(tmp_path, world):
    write_tasks(tmp_path)
    build(world_config(tmp_path, world.url, test_fraction=0.5))
    first, cost = [row["id"] for row in pairs(tmp_path / "out")], paid(world)
    build(world_config(tmp_path, world.url, test_fraction=0.5, seed=1), update=True)
    assert paid(world) == cost
    second = [row["id"] for row in pairs(tmp_path / "out")]
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_named_model_may_move_to_another_url_for_nothing(tmp_path, world):
    write_tasks(tmp_path, 10, answers=True)
    reviser = {"model": "world-reviser", "id": "the-reviser"}
    build(config_for(tmp_path, world.url, reviser={"url": world.url, **reviser}))
    cost = paid(world)
    build(config_for(tmp_path, world.url, reviser={"url": "http://127.0.0.1:9/v1", **reviser}))
    assert paid(world) == cost


def test_a_shared_ledger_answers_another_folder(tmp_path, world):
    write_tasks(tmp_path)
    shared = str(tmp_path / "shared.sqlite")
    build(world_config(tmp_path, world.url, ledger=shared))
    cost = paid(world)
    build(world_config(tmp_path, world.url, ledger=shared, out=str(tmp_path / "other")))
    assert paid(world) == cost
    assert final_bytes(tmp_path / "other") == final_bytes(tmp_path / "out")
    assert not (tmp_path / "out" / "ledger.sqlite").exists()


def test_two_processes_that_share_a_ledger_pay_each_request_once(tmp_path):
    write_tasks(tmp_path, 120)
    with running(ServerOptions(latency=0.1)) as server:
        recipe = write_recipe(
            tmp_path, server.url, **roles(server.url), ledger=str(tmp_path / "l.sqlite"), concurrency=4
        )
        both = [building.start_clair("build", recipe, "--out", tmp_path / name) for name in ("one", "two")]
        results = [building.finished(process) for process in both]
        assert [e.code for e in results] == [0, 0], results
        stats = server.stats()
    assert stats["paid_total"] == stats["paid_distinct"] == 240
    assert final_bytes(tmp_path / "one") == final_bytes(tmp_path / "two")
    calls = [manifest(tmp_path / name)["tokens"]["reviser"]["calls"] for name in ("one", "two")]
    assert sum(calls) == 120
    assert min(calls) > 0  # they shared the work


def test_equal_requests_of_one_run_are_requested_once(tmp_path, server):
    rows = [{"prompt": f"[[wait:0.3]] {n}", "id": n} for n in range(5)]
    building.write_prompts(tmp_path / "prompts.jsonl", rows)
    template = tmp_path / "own.j2"
    template.write_text("{{ task[:12] }}{{ answer[:0] }}")  # the reviser gets the same request for all
    target = {"url": server.url, "model": "t"}
    build(
        config_for(
            tmp_path,
            server.url,
            target=target,
            reviser={"url": server.url, "model": "m", "template": str(template), "ask_again": False},
        )
    )
    assert sum(request["body"]["model"] == "m" for request in server.requests()) == 1
    tokens = manifest(tmp_path / "out")["tokens"]["reviser"]
    assert (tokens["calls"], tokens["reused"]) == (1, 4)


def test_duplicates_are_kept_once_and_counted(tmp_path, world):
    tasks = write_tasks(tmp_path, 20)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    random.Random(0).shuffle(more := lines[:7])
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines, *more]) + "\n")
    cost = paid(world)
    content = build(world_config(tmp_path, world.url)).manifest
    assert paid(world) - cost == 2 * 20
    assert content["counts"]["prompts"] == 27
    assert content["drop_reasons"]["prompts.duplicate"] == 7
    assert content["counts"]["pairs"] + content["counts"]["dropped"] == 27
    assert {row["id"] for row in drops(tmp_path / "out") if row["reason"] == "duplicate"} <= {t.id for t in tasks}


def test_limit_takes_the_first_prompts_and_may_grow_for_nothing_paid_twice(tmp_path, world):
    write_tasks(tmp_path, 30)
    cost = paid(world)
    assert build(world_config(tmp_path, world.url, limit=10)).manifest["counts"]["prompts"] == 10
    assert paid(world) - cost == 20
    assert build(world_config(tmp_path, world.url)).manifest["counts"]["prompts"] == 30
    assert paid(world) - cost == 60


def test_accept_gives_exactly_the_first_pairs_in_prompt_order(tmp_path, world):
    write_tasks(tmp_path)
    build(world_config(tmp_path, world.url, test_fraction=0))
    everything = [row["id"] for row in pairs(tmp_path / "out")]
    build(world_config(tmp_path, world.url, test_fraction=0, accept=7, out=str(tmp_path / "seven"), concurrency=4))
    assert [row["id"] for row in pairs(tmp_path / "seven")] == everything[:7]
    assert manifest(tmp_path / "seven")["counts"]["pairs"] == 7


def test_as_many_requests_are_in_flight_as_the_recipe_says(tmp_path):
    write_tasks(tmp_path, 300, answers=True)
    with running(ServerOptions(answers_after=300)) as server:
        build(world_config(tmp_path, server.url, target=None, concurrency=300))
        assert server.stats()["max_in_flight"] == 300


# ---- endpoints that misbehave


def test_a_misbehaving_endpoint_still_gives_right_pairs(tmp_path):
    tasks = {task.id: task for task in write_tasks(tmp_path, 300)}
    wrong = Misbehaviour(
        too_many=0.05,
        server_error=0.05,
        slow=0.02,
        refusal=0.05,
        label_in_reasoning=0.1,
        truncation=0.08,
        allusion=0.05,
    )
    with running(ServerOptions(misbehaviour=wrong, retry_after=0.2, slow_seconds=0.5)) as server:
        built = build(world_config(tmp_path, server.url, concurrency=32))
        stats = server.stats()
    by_prompt = outcomes(tmp_path / "out")
    assert len(by_prompt) == 300
    assert built.failed == 0
    for row in pairs(tmp_path / "out"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        task = tasks[row["id"]]
        assert is_right(task, chosen)
        assert chosen in (task.right, rejected.replace(task.wrong_value, task.right_value))
        assert ALLUSION.strip() not in chosen
    reasons = built.manifest["drop_reasons"]
    assert reasons["reviser.refusal"] > 0
    assert reasons["reviser.truncated"] > 0
    assert reasons["filter.allusion"] > 0
    assert set(stats["misbehaviours"]) == {
        "too_many",
        "server_error",
        "slow",
        "refusal",
        "label_in_reasoning",
        "truncation",
        "allusion",
    }
    assert stats["paid_more_than_once"] == 0


def test_one_bad_row_of_200_gives_199_outcomes_and_one_failure(tmp_path, server):
    scripts = ["ok"] * 200
    scripts[77] = "400"
    building.write_prompts(tmp_path / "prompts.jsonl", building.scripted_rows(scripts))
    result = clair("build", write_recipe(tmp_path, server.url))
    assert result.code == 3
    assert "1 rows failed (see dropped.jsonl)" in result.err
    assert len(pairs(tmp_path / "out")) == 199
    (dropped,) = drops(tmp_path / "out")
    assert dropped == {
        "id": "row-77",
        "stage": "reviser",
        "reason": "http_400",
        "detail": "400: This prompt is too long.",
        "failed": True,
    }
    request_count = len(server.requests())
    assert clair("build", write_recipe(tmp_path, server.url)).code == 3
    assert len(server.requests()) == request_count + 1  # the failed one is tried again, nothing else


def test_strange_text_comes_through_unchanged(tmp_path, server):
    strange = [
        "bad {braces} {{ jinja }} {% raw %} ${HOME} %s %(x)s \\n",
        "bad مرحبا بالعالم שלום",
        "bad 😀👩‍👩‍👧 é \u2028 \u200b \x85 z",
        "bad <task> </task> {teacher_reasoning} mentioned",
        "bad\ttab\r\nwindows\rmac",
        "bad " + "long " * 20_000 + "end.",
    ]
    rows = [{"id": n, "prompt": f"Task {text}", "answer": text} for n, text in enumerate(strange)]
    building.write_prompts(tmp_path / "prompts.jsonl", rows)
    build(config_for(tmp_path, server.url, reviser={"url": server.url, "model": "m", "ask_again": False}))
    by_prompt = outcomes(tmp_path / "out")
    for n, text in enumerate(strange):
        expected = text.replace("bad", "good").strip()
        assert by_prompt[str(n)] == (expected if "mentioned" not in text else "reviser.label_in_answer")
    for row in pairs(tmp_path / "out"):
        assert row["prompt"][0]["content"] == f"Task {strange[int(row['id'])]}"
        assert row["rejected"][0]["content"] == strange[int(row["id"])]


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # aiohttp's, of two megabytes
def test_a_prompt_and_an_answer_of_a_megabyte_come_through_unchanged(tmp_path, server):
    prompt = "مرحبا 😀 {{ braces }} " * 40_000
    answer = "a bad start, then " + "long {words} é " * 70_000 + "an end."
    assert min(len(text.encode()) for text in (prompt, answer)) > 1_000_000
    rows = [{"id": 0, "prompt": prompt, "answer": answer}, {"id": 1, "prompt": "Task", "answer": "bad too"}]
    building.write_prompts(tmp_path / "prompts.jsonl", rows)
    assert build(config_for(tmp_path, server.url)).failed == 0
    first, second = sorted(pairs(tmp_path / "out"), key=lambda row: row["id"])
    assert first["prompt"][0]["content"] == prompt
    assert first["rejected"][0]["content"] == answer
    assert first["chosen"][0]["content"] == answer.replace("bad", "good")
    assert second["chosen"][0]["content"] == "good too"
    assert clair("report", tmp_path / "out").code == 0


def test_a_system_prompt_alone_is_answered_and_revised(tmp_path, server):
    turns = [{"role": "system", "content": "Say something bad."}]
    building.write_prompts(tmp_path / "prompts.jsonl", [{"id": "s", "prompt": turns}])
    build(config_for(tmp_path, server.url, target={"url": server.url, "model": "t"}))
    messages = {request["body"]["model"]: request["body"]["messages"] for request in server.requests()}
    assert messages["t"] == turns
    assert "Say something bad." in messages["m"][-1]["content"]
    (pair,) = pairs(tmp_path / "out")
    assert pair["prompt"] == turns
    assert pair["chosen"][0]["content"] == pair["rejected"][0]["content"].replace("bad", "good")


def test_a_conversation_is_sent_and_stored_as_it_is(tmp_path, server):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "a bad question"},
    ]
    building.write_prompts(tmp_path / "prompts.jsonl", [{"id": "c", "prompt": turns}])
    build(config_for(tmp_path, server.url, target={"url": server.url, "model": "t"}, filters={"identical": False}))
    messages = {request["body"]["model"]: request["body"]["messages"] for request in server.requests()}
    assert messages["t"] == turns
    (question,) = messages["m"]
    for turn_text in ("System:\nBe brief.", "User:\nHi", "Assistant:\nHello", "User:\na bad question"):
        assert turn_text in question["content"]
    assert pairs(tmp_path / "out")[0]["prompt"] == turns
