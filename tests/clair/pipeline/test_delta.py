"""Delta pairs, and the balance of length: which pairs are left out, and what the outputs say about it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from clair.cluster.merge import merge
from clair.core.errors import UserError
from clair.core.recipe import load_recipe
from clair.data.dataset import read_manifest, read_rows
from clair.data.dataset_card import quality_warnings
from clair.pipeline import balance
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from clair.pipeline.shards import Shard, shards_location
from recipes.world.running import running
from tests.clair.building import ROOT, clair, drops, error_line, final_bytes, write_prompts, write_recipe
from tests.clair.scripted import Scripted, choice, endpoint, install, recipe

MODELS = {"pipeline": "delta", "weaker": endpoint(), "stronger": endpoint()}
BALANCE = {"tokens": 100, "tokenizer": "words"}


@pytest.fixture(autouse=True)
def count_words(monkeypatch):
    """The tokenizer called `words` has one token a word; any other is loaded."""

    def by_words(texts, add_special_tokens):
        return {"input_ids": [text.split() for text in texts]}

    load = balance.load_tokenizer
    monkeypatch.setattr(balance, "load_tokenizer", lambda path, key: by_words if path == "words" else load(path, key))


def answers(tmp_path, monkeypatch, name="out", rows=10, stronger="good ", **keys):
    """Build from a weaker model that writes one word and a stronger one whose answers grow. Returns the config."""
    install(
        monkeypatch,
        weaker=Scripted("small", lambda m, s: "bad bad bad"),
        stronger=Scripted("large", lambda m, s: stronger * int(m[0]["content"].split()[-1])),
    )
    prompts = [{"id": f"r{n}", "prompt": f"say it {n}"} for n in range(1, rows + 1)]
    return recipe(tmp_path / name, prompts, **MODELS, test_fraction=0.3, **keys)


def lengths(out):
    """Chosen minus rejected, in words, by id."""
    words = {row["id"]: [len(row[s][0]["content"].split()) for s in ("chosen", "rejected")] for row in read_rows(out)}
    return {id: chosen - rejected for id, (chosen, rejected) in words.items()}


def test_the_stronger_models_answers_are_preferred_and_both_are_named(tmp_path, monkeypatch):
    built = build(answers(tmp_path, monkeypatch))
    rows = list(read_rows(tmp_path / "out"))
    assert len(rows) == 10
    assert all(row["models"] == {"chosen": "large", "rejected": "small"} for row in rows)
    assert {row["source"] for row in rows} == {"delta"}
    assert list(built.manifest["models"]) == ["weaker", "stronger"]


def test_ready_answers_need_no_model_and_a_blank_one_is_the_weakers(tmp_path):
    rows = [{"prompt": "a", "answer": "weak", "gold": "strong"}, {"prompt": "b", "answer": " ", "gold": "strong"}]
    file = write_prompts(tmp_path / "rows.jsonl", rows)
    config = {"path": str(file), "columns": {"stronger": "gold"}}
    config = {"pipeline": "delta", "prompts": config, "out": str(tmp_path / "out")}
    built = build(BuildConfig.model_validate(config))
    assert built.manifest["counts"]["pairs"] == 1
    assert built.manifest["drop_reasons"] == {"weaker.empty_reply": 1}


def test_pairs_get_the_mode_of_both_models_and_their_thoughts(tmp_path, monkeypatch):
    mode = {"enable_thinking": True}
    install(
        monkeypatch,
        weaker=Scripted("small", lambda m, s: choice("bad", reasoning_content="hm")),
        stronger=Scripted("large", lambda m, s: choice("good", reasoning_content="aha")),
    )
    models = {role: endpoint(chat_template_kwargs=mode) for role in ("weaker", "stronger")}
    build(recipe(tmp_path / "out", [{"prompt": "q"}], pipeline="delta", **models))
    (row,) = read_rows(tmp_path / "out")
    assert row["chat_template_kwargs"] == mode
    assert [row[side][0]["reasoning_content"] for side in ("chosen", "rejected")] == ["aha", "hm"]


def test_balance_leaves_out_as_few_of_the_longest_winners_as_it_needs(tmp_path, monkeypatch):
    config = answers(tmp_path, monkeypatch, balance=BALANCE)
    built = build(config)
    # The differences are -2 to 7: 7, 6 and 5 go, and one of 4 leaves the sum of -2 to 3 at 3, so 4 and 3 go too.
    assert set(lengths(tmp_path / "out").values()) == {-2, -1, 0, 1, 2}
    assert built.manifest["drop_reasons"] == {"balance.longer_winner": 5}
    assert built.manifest["counts"] | {"train": 0, "test": 0} == {
        "prompts": 10, "pairs": 5, "train": 0, "test": 0, "dropped": 5,
    }  # fmt: skip
    balanced = built.manifest["balance"]
    assert (balanced["before"]["pairs"], balanced["after"]["pairs"]) == (10, 5)
    assert balanced["after"]["mean"] <= 0 < balanced["before"]["mean"]
    lo, hi = balanced["after"]["ci95"]
    assert lo < balanced["after"]["mean"] < hi
    kept = list(read_rows(tmp_path / "out"))
    assert built.manifest["contrast"]["length_ratio"] == pytest.approx(
        sum(row["contrast"]["length_ratio"] for row in kept) / len(kept)
    )


def test_a_pair_whose_answers_differ_by_more_than_the_limit_is_left_out_first(tmp_path, monkeypatch):
    built = build(answers(tmp_path, monkeypatch, balance=BALANCE | {"tokens": 1}))
    assert set(lengths(tmp_path / "out").values()) == {-1, 0, 1}
    assert built.manifest["drop_reasons"] == {"balance.length_gap": 7}


def test_balanced_shards_merge_to_the_bytes_of_a_single_run(tmp_path, monkeypatch):
    whole = answers(tmp_path, monkeypatch, "out", rows=30, balance=BALANCE)
    build(whole)
    parts = answers(tmp_path, monkeypatch, "parts", rows=30, balance=BALANCE)
    for index in (1, 2, 3):
        build(parts, shard=Shard(index, 3))
    merge(shards_location(parts.out))
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "out")
    one, merged = (read_manifest(tmp_path / name) for name in ("out", "parts"))
    for key in ("balance", "counts", "drop_reasons", "contrast"):
        assert merged[key] == one[key], key


def test_a_changed_balance_pays_for_nothing_again(tmp_path, monkeypatch):
    config = answers(tmp_path, monkeypatch, balance=BALANCE)
    build(config)
    with pytest.raises(UserError, match=r"balance\.tokens"):
        build(answers(tmp_path, monkeypatch, balance=BALANCE | {"tokens": 2}))
    again = build(answers(tmp_path, monkeypatch, balance=BALANCE | {"tokens": 2}), update=True)
    assert all(tokens["calls"] == 0 for tokens in again.manifest["tokens"].values())
    assert set(lengths(tmp_path / "out").values()) == {-2, -1, 0, 1, 2}


def test_card_terminal_and_report_tell_the_balance_and_a_review_forgets_it(tmp_path, monkeypatch):
    build(answers(tmp_path, monkeypatch, balance=BALANCE))
    out = tmp_path / "out"
    sentence = "tokens of the winner less those of the loser: +0.0"
    assert sentence in (out / "README.md").read_text("utf-8")
    assert "tokens of the winner less" in clair("stats", out).out
    assert clair("report", out).code == 0
    assert sentence in (out / "report.html").read_text("utf-8")
    from clair.reporting.review import fingerprint

    (row, *_) = read_rows(out)
    marks = {"format": 1, "dataset": fingerprint(read_manifest(out)), "decisions": {row["id"]: "drop"}}
    (tmp_path / "d.json").write_text(json.dumps(marks))
    assert clair("keep", out, tmp_path / "d.json").code == 0
    assert "balance" not in read_manifest(out)


def test_a_note_says_so_where_balance_leaves_out_more_than_half(tmp_path, monkeypatch):
    built = build(answers(tmp_path, monkeypatch, stronger="good good good good ", balance=BALANCE))
    assert built.manifest["counts"]["pairs"] == 0
    assert built.manifest["balance"]["after"] == {"pairs": 0, "mean": None, "ci95": None}
    (note,) = quality_warnings(built.manifest)
    assert "balance left out 10 of 10 pairs" in note


def test_equal_differences_are_left_out_by_hash_whatever_the_order():
    def pair(id, chosen, rejected):
        turns = {"chosen": chosen, "rejected": rejected}
        return {"id": id} | {side: [{"role": "assistant", "content": text}] for side, text in turns.items()}

    rows = [*(pair(f"r{n}", "a b", "a") for n in range(4)), *(pair(f"s{n}", "a", "a b") for n in range(2))]
    chosen = []
    for order in (rows, rows[::-1]):
        differences = balance.LengthBalance(5, balance.load_tokenizer("words", ""))
        for row in order:
            differences.add(row)
        chosen.append(set(differences.surplus()))
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stronger": None}, "'delta' needs stronger"),
        ({"target": {"url": "http://127.0.0.1:9/v1", "model": "m"}}, "target is not used by the pipeline 'delta'"),
        ({"balance": {"tokens": 5}}, "balance counts tokens and no model is named by path; give balance.tokenizer"),
        ({"balance": {"tokens": 5, "tokenizer": "no-such-folder"}}, "balance.tokenizer no-such-folder: no tokenizer"),
        ({"balance": {"tokens": -1, "tokenizer": "x"}}, "balance.tokens: .*greater than or equal to 0"),
        ({"balance": {"token": 5}}, "unknown key 'balance.token'"),
        ({"balance": BALANCE, "accept": 5}, "accept cannot count them"),
        ({"weaker": endpoint(chat_template_kwargs={"enable_thinking": True})}, "differ in chat_template_kwargs"),
        ({"weaker": None}, "1 of 1 prompts have no answer and the recipe has no weaker; add weaker:"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_request(tmp_path, changes, match):
    import re

    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    url = "http://127.0.0.1:9/v1"
    models = {"weaker": {"url": url, "model": "m"}, "stronger": {"url": url, "model": "m"}, "reviser": None}
    path = write_recipe(tmp_path, url, **({"pipeline": "delta"} | models | changes))
    assert re.search(match, error_line(clair("build", path)))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_worlds_recipe_gives_its_expected_numbers_on_a_real_server(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    command = [sys.executable, "-m", "recipes.world.tasks", "--split", "train", "--count", "400", "--out", str(prompts)]
    subprocess.run(command, check=True, cwd=ROOT)
    with running() as server:
        urls = [f"{role}.url={server.url}" for role in ("weaker", "stronger")]
        overrides = [f"prompts.path={prompts}", f"out={tmp_path / 'pairs'}", *urls]
        overrides.append(f"balance.tokenizer={ROOT / 'recipes/world/model'}")
        built = build(load_recipe(BuildConfig, ROOT / "recipes/delta/world.yaml", overrides))
    assert built.manifest["counts"]["pairs"] == 78
    assert drops(tmp_path / "pairs")[-1]["stage"] == "balance"
    balanced = built.manifest["balance"]
    assert (balanced["before"]["pairs"], round(balanced["before"]["mean"], 1)) == (310, 24.5)
    assert abs(balanced["after"]["mean"]) < 0.05
