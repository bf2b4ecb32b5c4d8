"""`clair keep`: marked pairs move to dropped.jsonl, counts add up, nothing else changes, whenever it is cut off."""

from __future__ import annotations

import hashlib
import json
import shutil
from random import Random

import pytest
from typer.testing import CliRunner

import clair.reporting.review as module
from clair.cli import app
from clair.core.errors import UserError
from clair.data.dataset import CONTRAST, read_manifest, read_rows, split_file
from clair.reporting.review import Decisions, apply_decisions, fingerprint, read_decisions
from tests.browser.synthetic import synthetic_pairs, write_dataset

PAIRS, DROPS = 2300, 12  # more than two row groups


@pytest.fixture(scope="module")
def pairs():
    return synthetic_pairs(PAIRS, characters=120, different=300)


@pytest.fixture(scope="module")
def original(tmp_path_factory, pairs):
    return write_dataset(tmp_path_factory.mktemp("keep") / "pairs", pairs, DROPS)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pairs")


def decisions(folder, by_id, sha256="5" * 64) -> Decisions:
    return Decisions(fingerprint(read_manifest(folder)), by_id, sha256)


def bytes_of(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def some_decisions(folder, pairs, seed=0):
    ids = [pair.id for pair in pairs]
    dropped = Random(seed).sample(ids, 40)
    return decisions(folder, {**dict.fromkeys(ids[:20], "keep"), **dict.fromkeys(dropped, "drop")}), set(dropped)


def test_marked_pairs_move_to_the_dropped_ones_and_counts_add_up(folder, pairs):
    original, rows = read_manifest(folder), list(read_rows(folder))
    lines = (folder / "dropped.jsonl").read_text("utf-8")
    decided, dropped = some_decisions(folder, pairs)
    manifest = apply_decisions(folder, decided)
    assert manifest == read_manifest(folder)
    assert list(read_rows(folder)) == [row for row in rows if row["id"] not in dropped]
    text = (folder / "dropped.jsonl").read_text("utf-8")
    assert text.startswith(lines)
    added = [json.loads(line) for line in text[len(lines) :].splitlines()]
    assert [row["id"] for row in added] == [row["id"] for row in rows if row["id"] in dropped]
    assert {(row["stage"], row["reason"], row["failed"]) for row in added} == {("review", "marked", False)}
    counts = manifest["counts"]
    assert counts["prompts"] == original["counts"]["prompts"] == counts["pairs"] + counts["dropped"]
    assert counts["pairs"] == PAIRS - 40 == counts["train"] + counts["test"]
    assert manifest["drop_reasons"] == dict(sorted({**original["drop_reasons"], "review.marked": 40}.items()))
    assert sum(manifest["drop_reasons"].values()) == counts["dropped"]
    kept_count = 20 - len(dropped & {pair.id for pair in pairs[:20]})
    review = {"decisions_sha256": "5" * 64, "dataset": decided.dataset, "kept": kept_count, "dropped": 40}
    assert manifest["review"] == [review]
    for name in CONTRAST:
        left = [row["contrast"][name] for row in rows if row["id"] not in dropped]
        assert manifest["contrast"][name] == pytest.approx(sum(left) / len(left), rel=1e-12)
    assert list(manifest["files"]) == list(original["files"])
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert f"{PAIRS - 40} pairs" in (folder / "README.md").read_text("utf-8")
    unchanged = set(original) - {"counts", "drop_reasons", "contrast", "files"}
    assert {key: manifest[key] for key in unchanged} == {key: original[key] for key in unchanged}


def test_the_data_is_what_a_build_without_these_pairs_would_have_written(folder, pairs, tmp_path):
    decided, dropped = some_decisions(folder, pairs)
    apply_decisions(folder, decided)
    without = write_dataset(tmp_path / "without", [pair for pair in pairs if pair.id not in dropped], DROPS)
    for split in ("train", "test"):
        assert (folder / split_file(split)).read_bytes() == (without / split_file(split)).read_bytes()


def test_keeping_everything_changes_no_data(folder, pairs):
    original = bytes_of(folder)
    manifest = apply_decisions(folder, decisions(folder, {pair.id: "keep" for pair in pairs}))
    changed = bytes_of(folder)
    assert {name for name in changed if changed[name] != original.get(name)} == {"manifest.json"}
    assert manifest["review"][0]["dropped"] == 0
    assert "review.marked" not in manifest["drop_reasons"]


def test_a_folder_of_an_older_build_with_fewer_columns_is_kept_from_too(folder, pairs):
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        table = pq.read_table(folder / split_file(split))
        pq.write_table(table.drop_columns(["score_chosen", "score_rejected", "user"]), folder / split_file(split))
    apply_decisions(folder, decisions(folder, {pairs[0].id: "drop"}))
    rows = list(read_rows(folder))
    assert len(rows) == PAIRS - 1
    assert "user" not in rows[0]


def test_everything_may_be_dropped(folder, pairs):
    manifest = apply_decisions(folder, decisions(folder, {pair.id: "drop" for pair in pairs}))
    assert manifest["counts"]["pairs"] == 0
    assert manifest["counts"]["dropped"] == manifest["counts"]["prompts"]
    assert list(read_rows(folder)) == []


def test_a_new_folder_has_the_same_bytes_and_leaves_the_old_one_alone(folder, pairs, tmp_path):
    original = bytes_of(folder)
    decided, _ = some_decisions(folder, pairs)
    apply_decisions(folder, decided, tmp_path / "new")
    assert bytes_of(folder) == original
    first = bytes_of(tmp_path / "new")
    apply_decisions(folder, decided, tmp_path / "new")
    assert bytes_of(tmp_path / "new") == first
    apply_decisions(folder, decided)
    assert bytes_of(folder) == first


def test_the_same_decisions_twice_change_nothing(folder, pairs):
    decided, _ = some_decisions(folder, pairs)
    first = apply_decisions(folder, decided)
    reviewed = bytes_of(folder)
    assert apply_decisions(folder, decided) == first
    assert bytes_of(folder) == reviewed


def test_a_second_review_adds_to_the_first(folder, pairs):
    apply_decisions(folder, decisions(folder, {pairs[0].id: "drop"}, "1" * 64))
    manifest = apply_decisions(folder, decisions(folder, {pairs[1].id: "drop"}, "2" * 64))
    assert manifest["drop_reasons"]["review.marked"] == 2
    assert [review["decisions_sha256"][0] for review in manifest["review"]] == ["1", "2"]
    assert manifest["counts"]["prompts"] == manifest["counts"]["pairs"] + manifest["counts"]["dropped"]


@pytest.mark.parametrize("target", ["in place", "new folder"])
@pytest.mark.parametrize("limit", range(5))
def test_a_run_that_was_cut_off_is_finished_by_running_it_again(folder, pairs, tmp_path, monkeypatch, limit, target):
    decided, _ = some_decisions(folder, pairs)
    expected = shutil.copytree(folder, tmp_path / "expected")
    apply_decisions(expected, decided)
    out = None if target == "in place" else tmp_path / "new"
    count = 0

    def cut_off(name):
        original = getattr(module, name)

        def until(*arguments):
            nonlocal count
            if count == limit:
                raise KeyboardInterrupt
            count += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, until)

    for name in ("publish", "write_atomically", "write_json"):
        cut_off(name)
    with pytest.raises(KeyboardInterrupt):
        apply_decisions(folder, decided, out)
    monkeypatch.undo()
    if out is not None:
        shutil.rmtree(out)  # without a manifest it is no dataset: the error says so
    apply_decisions(folder, decided, out)
    assert {n: b for n, b in bytes_of(out or folder).items() if not n.endswith(".tmp")} == bytes_of(expected)


# ---- the user's mistakes


@pytest.mark.parametrize("count", [1, 7])
def test_unknown_ids_are_named(folder, pairs, count):
    original = bytes_of(folder)
    unknown = {f"no-{n}": "keep" for n in range(count)}
    with pytest.raises(UserError) as caught:
        apply_decisions(folder, decisions(folder, {pairs[0].id: "drop", **unknown}))
    assert "has no pair 'no-0'" in str(caught.value)
    assert ("and 2 more" in str(caught.value)) == (count == 7)
    assert bytes_of(folder) == original


def test_a_dropped_prompt_is_no_pair(folder):
    id = json.loads((folder / "dropped.jsonl").read_text("utf-8").splitlines()[0])["id"]
    with pytest.raises(UserError, match=f"has no pair '{id}'"):
        apply_decisions(folder, decisions(folder, {id: "drop"}))


def test_decisions_about_another_state_of_the_dataset_are_refused(folder, pairs):
    old = decisions(folder, {pairs[5].id: "drop"}, "9" * 64)
    apply_decisions(folder, decisions(folder, {pairs[0].id: "drop"}))
    with pytest.raises(UserError, match=f"are about dataset {old.dataset}, and .* make the page again"):
        apply_decisions(folder, old)


def test_a_folder_that_holds_something_else_is_not_written_over(folder, pairs, original, tmp_path):
    decided, _ = some_decisions(folder, pairs)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    for out in (tmp_path / "other", original, folder / "data"):
        with pytest.raises(UserError, match="not empty and no finished review of this dataset; choose another --out"):
            apply_decisions(folder, decided, out)
    with pytest.raises(UserError, match="is the dataset itself"):
        apply_decisions(folder, decided, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "found list; this version reads"),
        ('{"format": 2}', "found format 2; this version reads"),
        ('{"format": 1}', "needs dataset (text) and decisions"),
        ('{"format": 1, "dataset": "d", "decisions": []}', "needs dataset (text) and decisions"),
        ('{"format": 1, "dataset": "d", "decisions": {"a": "maybe"}}', "a: found 'maybe'; allowed: keep, drop"),
        ('{"format": 1, "dataset": "d", "decisions": {"a": ["keep"]}}', "a: found ['keep']; allowed: keep, drop"),
    ],
)
def test_a_file_that_holds_no_decisions_is_reported_in_one_line(tmp_path, content, message):
    file = tmp_path / "decisions.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_decisions(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the command


def test_the_command_applies_a_file(folder, pairs, tmp_path):
    file = tmp_path / "decisions.json"
    content = {"format": 1, "dataset": fingerprint(read_manifest(folder)), "decisions": {pairs[7].id: "drop"}}
    file.write_text(json.dumps(content))
    result = CliRunner().invoke(app, ["keep", str(folder), str(file)])
    assert result.exit_code == 0, result.output
    assert "review.marked" in result.output
    review = read_manifest(folder)["review"]
    assert review[0]["decisions_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    result = CliRunner().invoke(app, ["keep", str(folder), str(file), "--out", str(tmp_path / "new")])
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "new").exists()


def test_a_reviewed_folder_loads_with_datasets(folder, pairs, tmp_path):
    from clair.data.dataset import load_pairs
    from clair.reporting.dataset_report import report

    apply_decisions(folder, decisions(folder, {pairs[0].id: "drop"}), tmp_path / "new")
    report(tmp_path / "new")
    counts = read_manifest(tmp_path / "new")["counts"]
    for split in ("train", "test"):
        assert len(load_pairs(tmp_path / "new", split)) == counts[split]


def test_a_build_undoes_a_review_only_on_request(tmp_path, monkeypatch):
    from clair.pipeline.build import build
    from tests.clair.scripted import Scripted, endpoint, install, recipe, revision

    install(monkeypatch, reviser=Scripted("reviser", revision))
    rows = [{"id": f"r{i}", "prompt": f"question {i}", "answer": "a bad answer"} for i in range(3)]
    config = recipe(tmp_path / "out", rows, pipeline="revised", reviser=endpoint(price={"input": 1, "output": 2}))
    built = build(config)
    assert float(built.manifest["cost"]["reviser"]) > 0
    file = tmp_path / "decisions.json"
    dataset = fingerprint(built.manifest)
    file.write_text(json.dumps({"format": 1, "dataset": dataset, "decisions": {"r1": "drop"}}))
    apply_decisions(tmp_path / "out", read_decisions(file), None)
    with pytest.raises(UserError, match="was reviewed"):
        build(config)
    assert build(config, update=True).manifest["counts"]["pairs"] == 3
