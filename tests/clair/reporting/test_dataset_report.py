"""`clair report`: numbers of all pairs, text of a spread sample, never too large, always the same bytes."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import clair.reporting.dataset_report as module
from clair.cli import app
from clair.core.errors import UserError
from clair.data.contrast import split_words
from clair.data.dataset import read_manifest, read_rows
from clair.reporting.dataset_report import explain, full_text, report
from clair.reporting.html_page import json_text
from clair.reporting.review import fingerprint
from clair.reporting.sampling import METRICS, PairColumns, cut, fit_to_page, opening, read_filters, stratified_order
from tests.browser.synthetic import DROPS, INJECTIONS, synthetic_pairs, write_dataset

PAIRS = 150


@pytest.fixture(scope="module")
def pairs():
    return synthetic_pairs(PAIRS, characters=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs):
    return write_dataset(tmp_path_factory.mktemp("report") / "pairs", pairs, 30)


def block(file, name: str):
    """A JSON block of a page."""
    return json.loads(re.search(f'id="{name}">([^<]*)</script>', file.read_text("utf-8"))[1])


def test_the_page_shows_the_content_of_the_folder(folder, pairs):
    data, texts = (block(report(folder), name) for name in ("data", "texts"))
    manifest = read_manifest(folder)
    by_id = {pair.id: pair for pair in pairs}
    rows = data["rows"]
    assert data["overview"]["counts"] == manifest["counts"]
    assert data["fingerprint"] == fingerprint(manifest)
    assert rows["id"] == [row["id"] for row in read_rows(folder)]
    assert sum(rows["test"]) == manifest["counts"]["test"]
    for index, id in enumerate(rows["id"]):
        pair = by_id[id]
        for name, value in pair.contrast.items():
            assert rows["numbers"][name][index] == pytest.approx(value, abs=5e-5)
        assert rows["numbers"]["more_words"][index] == len(split_words(pair.chosen)) - len(split_words(pair.rejected))
        entry = texts[str(index)]
        assert entry["prompt"] == [["user", pair.messages[0]["content"]]]
        assert "".join(piece[1] for piece in entry["diff"] if piece[0] >= 0) == pair.chosen
        assert entry["reasoning"] == pair.reasoning
        assert entry["models"] == dict(pair.models)
    for name, plot in data["overview"]["histograms"].items():
        assert sum(plot["counts"]) == plot["n"] == PAIRS
        assert plot["mean"] == pytest.approx(manifest["contrast"][name], abs=1e-4)


def test_lengths_are_compared_by_hand(tmp_path, pairs):
    texts = [("a b", "a b c"), ("a b", "a b"), ("a b c", "a"), ("a", "a b c d")]
    changed = [replace(p, rejected=r, chosen=c) for p, (r, c) in zip(pairs, texts, strict=False)]
    lengths = block(report(write_dataset(tmp_path / "d", changed)), "data")["overview"]["lengths"]
    assert (lengths["longer"], lengths["shorter"], lengths["median_more"]) == (2, 1, 1)
    assert lengths["mean"] == {"chosen": 10 / 4, "rejected": 8 / 4}
    assert sum(count for _, _, count in lengths["grid"]) == 4


def test_every_dropped_row_is_there_with_its_reason(folder):
    drops = block(report(folder), "data")["drops"]
    lines = [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]
    names = [drops["reasons"][index]["name"] for index in drops["reason"]]
    assert names == [f"{line['stage']}.{line['reason']}" for line in lines]
    assert (drops["id"], drops["detail"]) == ([r["id"] for r in lines], [r["detail"] for r in lines])
    assert {reason["name"]: reason["count"] for reason in drops["reasons"]} == read_manifest(folder)["drop_reasons"]
    assert {drop.stage for drop in DROPS} == {name.split(".")[0] for name in names}


def test_equal_folders_give_equal_bytes(tmp_path, folder, pairs):
    first = report(folder, tmp_path / "first.html").read_bytes()
    assert report(folder, tmp_path / "second.html").read_bytes() == first
    again = write_dataset(tmp_path / "pairs", pairs, 30)
    assert report(again).read_bytes() == first


# ---- size


@pytest.mark.parametrize("room", [400_000, 800_000])
def test_a_page_is_never_larger_than_it_may_be(tmp_path, monkeypatch, room):
    synthetic = synthetic_pairs(1500, characters=800, different=200)
    synthetic = [replace(p, id=f"{number}-" + "<" * (number % 90)) for number, p in enumerate(synthetic)]
    monkeypatch.setattr(module, "MAX_BYTES", room)
    monkeypatch.setattr(module, "_ROWS_BYTES", room // 2)
    monkeypatch.setattr(module, "_DROPS_BYTES", room // 20)
    file = report(write_dataset(tmp_path / "d", synthetic, 900))
    assert file.stat().st_size <= room
    data, full = block(file, "data"), block(file, "full")
    assert data["overview"]["counts"]["pairs"] == 1500
    assert sum(data["overview"]["histograms"]["jaccard"]["counts"]) == 1500
    assert 300 < len(data["rows"]["id"]) <= 1500
    assert {int(index) for index in block(file, "texts")} == set(full)
    assert len(full) > 10
    shown = Counter(data["drops"]["reason"])
    assert 0 < len(data["drops"]["id"]) < 900
    assert len(shown) == len(DROPS)
    assert max(shown.values()) - min(shown.values()) <= 1


def test_openings_are_shortened_before_pairs_are_left_out():
    rows = rows_of([(0.5, 1.0)] * 100)
    rows.openings = ["光合作用" * 20 if number % 2 else "short" for number in range(100)]
    full = list(rows.openings)
    assert fit_to_page(rows, 1_000_000) == list(range(100))
    assert rows.openings == full
    assert fit_to_page(rows, 12_000) == list(range(100))
    assert [text for text in rows.openings if text != "short"] == [rows.openings[1]] * 50
    assert 8 < len(rows.openings[1]) < 40
    assert 30 < len(fit_to_page(rows, 3_000)) < 100


@given(st.text(st.characters(), max_size=80), st.integers(10, 200))
def test_a_text_that_is_cut_is_a_beginning_and_small_enough(text, limit):
    assert text.startswith(cut(text, limit))
    assert len(json_text(cut(text, limit)).encode()) <= limit


def test_very_long_texts_are_shown_in_part(tmp_path, pairs):
    long = replace(pairs[20], chosen="new " * 300_000, messages=({"role": "user", "content": "x" * 1_000_000},))
    folder = write_dataset(tmp_path / "d", [long, *pairs[21:23]])
    file = report(folder)
    assert file.stat().st_size < 2_000_000
    (entry,) = [text for text in block(file, "texts").values() if "left out" in text["prompt"][0][1]]
    assert "900,000 characters left out" in entry["prompt"][0][1]
    assert len(block(file, "full")) == 3


# ---- the sample


def rows_of(values) -> PairColumns:
    """Rows with these (jaccard, length_ratio)."""
    rows = PairColumns()
    for number, (jaccard, ratio) in enumerate(values):
        rows.ids.append(f"id-{number}")
        rows.openings.append("")
        for name, column in rows.numbers.items():
            column.append({"jaccard": jaccard, "length_ratio": ratio}.get(name, 0))
    return rows


def test_rare_pairs_come_early():
    rows = rows_of([(0.9, 1.0)] * 970 + [(0.9, 0.5)] * 10 + [(0.9, 2.0)] * 10 + [(0.1, 1.0)] * 10)
    first = stratified_order(rows, range(1000))[:120]
    assert sum(970 <= i < 980 for i in first) >= 4
    assert sum(980 <= i < 990 for i in first) >= 4
    assert sum(i >= 990 for i in first) >= 4


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 3)), max_size=80), st.randoms())
def test_the_sample_is_an_order_of_all_and_depends_on_nothing_else(values, random):
    rows = rows_of(values)
    among = list(range(len(values)))
    order = stratified_order(rows, among)
    assert sorted(order) == among
    random.shuffle(among)
    assert stratified_order(rows, among) == order


def test_short_texts_are_all_included(folder, monkeypatch, tmp_path, pairs):
    monkeypatch.setattr(module, "FULL_TEXTS", 30)
    characters = sum(len(p.chosen) + len(p.rejected) + len(p.messages[0]["content"]) for p in pairs)
    for short, expected in ((characters, PAIRS), (characters - 1, PAIRS - 1), (0, 30)):
        monkeypatch.setattr(module, "_SHORT", short)
        assert len(block(report(folder, tmp_path / "page.html"), "full")) == expected


def test_full_texts_are_spread_over_contrast(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "FULL_TEXTS", 30)
    monkeypatch.setattr(module, "_SHORT", 0)
    file = report(folder, tmp_path / "page.html")
    jaccard = block(file, "data")["rows"]["numbers"]["jaccard"]
    full = block(file, "full")
    assert len(full) == 30
    assert {min(int(10 * jaccard[i]), 9) for i in full} == {min(int(10 * value), 9) for value in jaccard}


# ---- filters


def test_filters_choose_whose_text_is_there(folder, pairs, tmp_path):
    def chosen(*filters):
        file = report(folder, tmp_path / "page.html", filters)
        ids = block(file, "data")["rows"]["id"]
        assert len(ids) == PAIRS
        return {ids[index] for index in block(file, "full")}

    assert chosen("jaccard<0.5") == {p.id for p in pairs if round(p.contrast["jaccard"], 4) < 0.5}
    assert chosen(f"id={pairs[3].id}") == {pairs[3].id}
    assert chosen("text~HACKED = 2") == {pairs[1].id}
    low = {p.id for p in pairs if p.contrast["jaccard"] <= 0.9}
    assert chosen("jaccard<=0.9", "split=train") == low & {row["id"] for row in read_rows(folder, ["train"])}
    assert INJECTIONS[1] in pairs[1].chosen


@pytest.mark.parametrize(
    ("sign", "holds"), [("<", [1]), ("<=", [1, 2]), (">", [3]), (">=", [2, 3]), ("=", [2]), (" < ", [1])]
)
def test_signs_of_filters(sign, holds):
    assert [n for n in (1, 2, 3) if read_filters([f"levenshtein{sign}2"])({"levenshtein": n})] == holds


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("jacard<0.5", "unknown name 'jacard' (did you mean 'jaccard'?); allowed: jaccard, "),
        ("jaccard", "give NAME, one of < <= > >= = ~, and a value"),
        ("jaccard<low", "jaccard takes < <= > >= = and a number"),
        ("jaccard~0.5", "jaccard takes < <= > >= = and a number"),
        ("split<test", "split takes ="),
        ("text=word", "text takes ~"),
    ],
)
def test_a_filter_that_cannot_be_read_is_reported_in_one_line(filter, message):
    with pytest.raises(UserError) as caught:
        read_filters([filter])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_filter_that_no_pair_fits_is_an_error(folder):
    with pytest.raises(UserError, match=r"no pair of .* fits --filter jaccard<-1 --filter split=test"):
        report(folder, filters=["jaccard<-1", "split=test"])


# ---- words


def test_the_opening_is_of_the_last_user_turn_on_one_line():
    last = " Now\n\n then \t?" + "x" * 300
    turns = [("system", "Be kind."), ("user", "First?"), ("assistant", "Yes."), ("user", last)]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert opening(messages).startswith("Now then ?x")
    assert len(opening(messages)) == 110
    assert opening(messages[:1]) == "Be kind."
    assert opening([]) == ""


def test_full_text_of_a_conversation_has_its_roles(pairs):
    row = pairs[30].row()
    row["prompt"] = [{"role": "system", "content": "Be kind."}, *row["prompt"]]
    assert [role for role, _ in full_text(row, 1000)["prompt"]] == ["system", "user"]


def test_reasons_are_explained():
    assert explain("filter.identical").startswith("Chosen and rejected differ in white space only")
    assert explain("reviser.no_label") == "the label does not stand at the start of a line"
    assert explain("review.marked") == "a person marked the pair drop"
    assert explain("reviser.http_500") == ""


def test_every_number_of_the_page_says_what_it_is():
    assert all(METRICS.values())


# ---- the command


def test_the_command_says_where_the_page_is(folder, tmp_path):
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(out), "--filter", "split=test"])
    assert result.exit_code == 0, result.output
    assert str(out) in result.output.replace("\n", "")
    assert out.is_file()


def test_a_folder_that_is_no_dataset_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished dataset .* give a folder made by `clair build`"):
        report(tmp_path)
    assert not list(tmp_path.iterdir())
