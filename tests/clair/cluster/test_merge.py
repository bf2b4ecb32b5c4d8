"""Shards of a build, joined: the bytes of the build that was never sharded."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
from pathlib import Path

import pytest

from clair.cluster.merge import _allow_files, merge
from clair.core.errors import UserError
from clair.inference.model import RequestFailed
from clair.pipeline.build import build
from clair.pipeline.config import redacted
from clair.pipeline.shards import Shard, parse_shard, shard_config
from clair.storage.location import Location
from tests.clair.building import clair, drops, final_bytes, manifest, pairs
from tests.clair.scripted import Scripted, endpoint, install, recipe, revision, verdict

PRICE = {"input": "1", "output": "2"}


def rows(count, seed=0):
    """Some of them twice, nearly twice, or with a revision that is dropped."""
    draw = random.Random(seed)
    result = []
    for n in range(count):
        text = " ".join(draw.choice("abcdefghij") * 3 for _ in range(12))
        answer = draw.choice(["bad answer", "fine answer"]) + f" {n}"
        result.append({"prompt": f"question {text}", "answer": answer})
        if draw.random() < 0.1:
            result.append(draw.choice(result))
        if draw.random() < 0.1:
            result.append({"prompt": draw.choice(result)["prompt"] + " please", "answer": "bad twin"})
    return result


def settings(out, prompt_rows, **keys):
    return recipe(
        out, prompt_rows,
        **{"pipeline": "revised", "reviser": endpoint(price=PRICE, max_tokens=100), "test_fraction": 0.2} | keys,
    )  # fmt: skip


def build_all(config, of):
    for index in range(1, of + 1):
        built = build(config, shard=Shard(index, of))
        assert built.stopped is None
        assert built.manifest["shard"] == {"index": index, "of": of}


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_merged_shards_are_the_bytes_of_one_run_whatever_their_number(tmp_path, monkeypatch, of):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    prompt_rows = rows(150)
    single = settings(tmp_path / "one", prompt_rows, prompts={"path": "x", "near_duplicates": 0.6})
    prompts = {"path": Location(tmp_path / "one-prompts.jsonl"), "near_duplicates": 0.6}
    single = single.model_copy(update={"prompts": single.prompts.model_copy(update=prompts)})
    build(single)
    config = single.model_copy(update={"out": Location(tmp_path / "all")})
    build_all(config, of)
    merge(tmp_path / "all-shards")
    assert final_bytes(tmp_path / "all") == final_bytes(tmp_path / "one")
    assert (tmp_path / "all" / "README.md").read_bytes() == (tmp_path / "one" / "README.md").read_bytes()
    assert {row["reason"] for row in drops(tmp_path / "all")} >= {"duplicate", "near_duplicate", "identical"}
    first, second = manifest(tmp_path / "one"), manifest(tmp_path / "all")
    for key in ("seconds", "recipe"):
        first.pop(key), second.pop(key)
    calls = [m["tokens"]["reviser"].pop(key) for m in (first, second) for key in ("calls", "reused")]
    assert sum(calls[:2]) == sum(calls[2:])
    assert first == second


def test_a_merged_folder_is_built_again_without_asking(tmp_path, monkeypatch):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    config = settings(tmp_path / "all", rows(40))
    build_all(config, 3)
    merge(tmp_path / "all-shards")
    files, request_count = final_bytes(tmp_path / "all"), len(model.requests)
    assert build(config).manifest["counts"] == manifest(tmp_path / "all")["counts"]
    assert final_bytes(tmp_path / "all") == files
    assert len(model.requests) == request_count


def test_a_row_that_failed_in_a_merge_and_is_answered_before_the_next_is_paid_for_once(tmp_path, monkeypatch):
    refusals = [True]

    def answer(messages, sample):
        if "question 3" in messages[0]["content"] and refusals:
            raise RequestFailed("refused", "not today")
        return revision(messages, sample)

    model = Scripted("reviser", answer)
    install(monkeypatch, reviser=model)
    config = settings(tmp_path / "all", [{"prompt": f"question {n}", "answer": "a bad answer"} for n in range(6)])
    for _ in range(2):
        build_all(config, 2)
        merge(tmp_path / "all-shards")
        refusals.clear()
    sent = len(model.requests)
    assert build(config).manifest["counts"]["pairs"] == 6
    assert len(model.requests) == sent


def test_shards_that_share_a_ledger_pay_once_for_equal_requests(tmp_path, monkeypatch):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    config = settings(tmp_path / "all", rows(40), ledger=str(tmp_path / "shared.sqlite"))
    build_all(config, 2)
    build_all(config, 3)
    assert len(model.requests) == len({json.dumps(request, sort_keys=True) for request in model.requests})
    shutil.rmtree(tmp_path / "all-shards")
    build_all(config, 2)
    merge(tmp_path / "all-shards")
    assert not (tmp_path / "all" / "ledger.sqlite").exists()


def test_the_position_bias_of_all_shards_is_counted_together(tmp_path, monkeypatch):
    prompt_rows = [{"prompt": f"q {n}", "answers": [f"bad {n}", f"good {n}"]} for n in range(30)]
    keys = {"pipeline": "judged", "reviser": None, "judge": endpoint(order="random")}
    for name, of in (("one", 0), ("all", 4)):
        install(monkeypatch, judge=Scripted("judge", lambda *_: verdict("[1]")))
        config = recipe(tmp_path / name, prompt_rows, **{k: v for k, v in keys.items() if v})
        if of:
            build_all(config, of)
            merge(tmp_path / f"{name}-shards")
        else:
            build(config)
    assert manifest(tmp_path / "all")["position"] == manifest(tmp_path / "one")["position"]
    assert manifest(tmp_path / "all")["position"]["first"] == 30
    assert final_bytes(tmp_path / "all") == final_bytes(tmp_path / "one")


def test_each_shard_may_spend_its_part():
    from clair.core.recipe import resolve
    from clair.pipeline.config import BuildConfig

    reviser = endpoint(price=PRICE, requests_per_minute=3, tokens_per_minute=1000)
    values = {"pipeline": "revised", "prompts": {"path": "p"}, "reviser": reviser, "out": "o", "budget": {"money": 10}}
    config = shard_config(resolve(BuildConfig, values), Shard(2, 4))
    assert config.budget.money * 4 == 10
    assert (config.reviser.requests_per_minute, config.reviser.tokens_per_minute) == (1, 250)
    assert config.out == "o-shards/2-of-4"


def test_the_bar_of_a_shard_comes_to_its_total(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    config = settings(tmp_path / "all", rows(60))
    (tmp_path / "recipe.yaml").write_text(json.dumps(redacted(config)))
    counts = []
    for index in (1, 2, 3):
        built = clair("build", tmp_path / "recipe.yaml", "--shard", f"{index}/3")
        assert built.code == 0, built
        counts.append(tuple(map(int, re.findall(r"(\d+)/(\d+)", built.err)[-1])))
    assert all(count == total for count, total in counts), counts
    assert sum(count for count, _ in counts) == len(Path(config.prompts.path).read_text().splitlines())
    assert len(set(counts)) > 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/", "-1/4"])
def test_an_invalid_shard_is_refused(text):
    with pytest.raises(UserError, match="give the shard and their number"):
        parse_shard(text)


def test_shards_that_do_not_fit_are_refused_by_name(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    config = settings(tmp_path / "all", rows(30))
    with pytest.raises(UserError, match="accept: 5 takes the first pairs"):
        build(config.model_copy(update={"accept": 5}), shard=Shard(1, 2))
    with pytest.raises(UserError, match="holds no shards"):
        merge(tmp_path)
    build(config, shard=Shard(1, 3))
    build(config, shard=Shard(3, 3))
    with pytest.raises(UserError, match="lacks shard 2/3; run clair build --shard 2/3 first"):
        merge(tmp_path / "all-shards")
    build(config.model_copy(update={"seed": 5}), shard=Shard(2, 3))
    with pytest.raises(UserError, match=r"2-of-3 was not built as .*1-of-3 was \(it differs in seed\)"):
        merge(tmp_path / "all-shards")
    build(config, shard=Shard(2, 3), update=True)
    build(config, shard=Shard(1, 2))
    with pytest.raises(UserError, match=r"holds shards of several numbers \(2, 3\)"):
        merge(tmp_path / "all-shards")
    shutil.rmtree(tmp_path / "all-shards" / "1-of-2")
    result = clair("merge", tmp_path / "all-shards")
    assert result.code == 0, result
    assert len(pairs(tmp_path / "all")) == manifest(tmp_path / "all")["counts"]["pairs"]


def test_a_merge_may_open_the_files_of_all_shards_or_says_what_to_raise():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        _allow_files(150)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 200
        _allow_files(limits[0])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(UserError, match=rf"{2**62} files to open at once, .* raise it \(ulimit -Hn\)"):
        _allow_files(2**62)
