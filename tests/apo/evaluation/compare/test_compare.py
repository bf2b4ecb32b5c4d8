"""Comparing result folders: by pencil, against the independent statistics, and refused where it would mean nothing."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from apo.cli import app
from apo.evaluation.compare.changes import change_kind, changed_answers
from apo.evaluation.compare.compare import comparison
from apo.evaluation.compare.power import other_splits
from apo.evaluation.compare.rows import model_names, pair_rows, read_comparable
from apo.evaluation.records.mixeval import JudgeUsed, MixEvalItem
from apo.evaluation.results import read_results
from apo.evaluation.tables import comparison_notes
from clair.core.errors import UserError
from clair.core.statistics import paired_difference
from tests.apo.evaluation.evaluating import evaluated
from tests.apo.evaluation.made_results import make_items, write_folder
from tests.house.pages import ROOT, tables


def item(row: int, question: str, score: float, **changes: object) -> MixEvalItem:
    values = {"split": "free-form", "benchmark": "DROP", "prompt": "p", "target": ("1",), "response": "r"}
    return MixEvalItem(**{**values, "row": row, "question": question, "score": score, **changes})


def folders(tmp_path: Path, *scores: list[float], questions: Sequence[str] = "aabbc") -> list[Path]:
    """A result folder for each list of scores, one row each."""
    paths = []
    for number, model_scores in enumerate(scores):
        items = [
            item(row, question, score)
            for row, (question, score) in enumerate(zip(questions, model_scores, strict=True))
        ]
        paths.append(write_folder(tmp_path / f"m{number}", items, f"m{number}"))
    return paths


def compared(paths: list[Path], **options: object) -> dict:
    return comparison(read_comparable(paths[0], paths[1:]), **options)


# ---- numbers


def test_a_difference_by_pencil(tmp_path):
    # The five rows of test_statistics: differences 1, 0 | -1, 1 | 1.
    result = compared(folders(tmp_path, [0, 1, 1, 0, 0], [1, 1, 0, 1, 1]))
    overall = result["parts"][0]
    difference = overall["tuned"][0]
    assert (overall["level"], overall["rows"], overall["questions"]) == ("overall", 5, 3)
    assert overall["base"]["score"] == pytest.approx(0.4)
    assert difference["score"] == pytest.approx(0.8)
    assert difference["delta"] == pytest.approx(0.4)
    assert difference["delta_se"] == pytest.approx(math.sqrt((0.04 / 0.6 + 0.64 / 0.6 + 0.36 / 0.8) / 25))
    assert (difference["better"], difference["worse"], difference["wrong_to_right"], difference["right_to_wrong"]) == (
        3,
        1,
        3,
        1,
    )
    assert difference["p_holm"] == difference["p"]


def test_each_split_and_benchmark_has_its_own_difference(tmp_path):
    base, tuned = make_items(0.4), make_items(0.4, seed=1, shift=0.2)
    paths = [write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned, "t")]
    entries = compared(paths)["parts"]
    names = [(entry["split"], entry["benchmark"]) for entry in entries]
    free = [("free-form", name) for name in (None, "BBH", "DROP", "TriviaQA")]
    assert names == [(None, None), *free, *(("multiple-choice", name) for name in (None, "ARC", "HellaSwag", "MMLU"))]
    for entry in entries:
        chosen = [
            (base_item, tuned_item)
            for base_item, tuned_item in zip(base, tuned, strict=True)
            if entry["split"] in (None, base_item.split) and entry["benchmark"] in (None, base_item.benchmark)
        ]
        assert entry["rows"] == len(chosen)
        if entry["benchmark"] in ("BBH", "ARC"):
            assert entry["tuned"][0]["no_interval"] == "a single question"
            assert entry["tuned"][0]["delta_ci95"] is entry["tuned"][0]["p_holm"] is None
            continue
        questions = [base_item.question for base_item, _ in chosen]
        expected = paired_difference([o.score for o, _ in chosen], [t.score for _, t in chosen], questions)
        assert entry["tuned"][0]["delta_ci95"] == [expected.estimate.lo, expected.estimate.hi]
        assert entry["tuned"][0]["p"] == expected.p


def test_p_values_are_corrected_over_models_and_on_each_level_over_its_parts(tmp_path):
    paths = [write_folder(tmp_path / "base", make_items(0.4), "b")]
    for seed in (1, 2, 3):
        paths.append(write_folder(tmp_path / f"t{seed}", make_items(0.4, seed=seed, shift=0.05 * seed), f"t{seed}"))
    entries = compared(paths)["parts"]
    overall = sorted((difference["p"], difference["p_holm"]) for difference in entries[0]["tuned"])
    assert overall[0][1] == pytest.approx(min(1, 3 * overall[0][0]))
    splits = sorted(
        (difference["p"], difference["p_holm"])
        for entry in entries
        if entry["level"] == "split"
        for difference in entry["tuned"]
    )
    assert len(splits) == 6
    assert splits[0][1] == pytest.approx(min(1, 6 * splits[0][0]))


def test_no_spread_gives_no_interval_instead_of_a_certain_one(tmp_path):
    result = compared(folders(tmp_path, [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]))
    assert result["parts"][0]["tuned"][0]["no_interval"] == "every question differs by the same amount"
    assert result["parts"][0]["tuned"][0]["delta"] == 1
    assert result["power"] == [None]
    same = compared(folders(tmp_path / "same", [0, 1, 0, 1, 0], [0, 1, 0, 1, 0]))
    assert (same["parts"][0]["tuned"][0]["delta"], same["parts"][0]["tuned"][0]["p"]) == (0, None)


def test_questions_about_one_passage_are_one_cluster(tmp_path):
    scores = [[0, 0, 0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1, 1, 1]]
    paths = []
    for number, model_scores in enumerate(scores):
        items = [item(r, f"q{r}", s, passage="p" if r < 3 else None) for r, s in enumerate(model_scores)]
        paths.append(write_folder(tmp_path / f"m{number}", items, f"m{number}"))
    result = compared(paths)
    expected = paired_difference(*scores, ["p", "p", "p", 3, 4, 5, 6, 7])
    difference = result["parts"][0]["tuned"][0]
    assert (result["questions"], result["clusters"]) == (8, 6)
    assert (difference["delta_se"], difference["differing"]) == (expected.estimate.se, expected.differing)
    assert (
        difference["p"] == expected.cautious_p == expected.p_sign == 1.0
    )  # one passage and a question better, one worse


def test_a_difference_that_only_the_t_test_sees_is_none(tmp_path):
    paths = folders(tmp_path, [0.0] * 100, [1.0] * 4 + [0.0] * 96, questions=[f"q{n}" for n in range(100)])
    result = compared(paths)
    difference = result["parts"][0]["tuned"][0]
    assert (difference["p"], difference["p_holm"], difference["p_sign"], difference["delta"]) == (
        0.125,
        0.125,
        0.125,
        0.04,
    )
    assert (difference["delta_ci95"], difference["no_interval"]) == (None, "only 4 questions differ")
    assert result["power"][0]["detectable"] > 0.04
    shown = CliRunner().invoke(app, ["compare", *map(str, paths)], catch_exceptions=False).output
    assert "4 questions or passages differ, too few for a t-test alone" in " ".join(shown.split())


def test_no_interval_reaches_beyond_100_points(tmp_path):
    result = compared(folders(tmp_path, [0, 0, 0, 1], [1, 1, 1, 0], questions="abcd"))["parts"][0]["tuned"][0]
    assert result["delta_ci95"] == [-1.0, 1.0]


def unresolved(scores: list[float | None], name: str = "no_brackets") -> list[MixEvalItem]:
    """Items with these scores, None for one without a verdict."""
    return [
        item(row, f"q{row}", score or 0.0, unresolved=None if score is not None else name)
        for row, score in enumerate(scores)
    ]


def test_a_difference_carries_the_bracket_of_what_is_unresolved(tmp_path):
    base = write_folder(tmp_path / "b", unresolved([1, 0, 0, None, 0]), "b")
    tuned = write_folder(tmp_path / "t", unresolved([1, 1, None, None, 0]), "t")
    result = compared([base, tuned])
    overall = result["parts"][0]
    assert overall["base"]["bracket"] == [0.2, 0.4]
    difference = overall["tuned"][0]
    assert difference["bracket"] == [0.4, 0.8]
    assert difference["delta_bracket"] == pytest.approx([0.0, 0.6])
    assert difference["delta"] == pytest.approx(0.2)
    shown = CliRunner().invoke(app, ["compare", str(base), str(tuned)], catch_exceptions=False).output
    assert "1 items of b and 2 of its own are unresolved" in " ".join(shown.split())
    assert "+0.0 to +60.0" in " ".join(shown.split())


def test_a_row_that_a_server_refused_is_in_the_bracket_only(tmp_path):
    base = write_folder(tmp_path / "b", unresolved([1, 0, 0, 1, 0]), "b")
    tuned = write_folder(tmp_path / "t", unresolved([1, 1, 1, 0, None], "judge_http_400"), "t")
    result = compared([base, tuned])
    assert (result["rows"], result["left_out"]) == (4, 1)
    difference = result["parts"][0]["tuned"][0]
    assert difference["delta"] == pytest.approx(1 / 4)
    assert difference["delta_bracket"] == pytest.approx([1 / 5, 2 / 5])
    none = write_folder(tmp_path / "n", unresolved([None] * 5, "judge_http_400"), "n")
    with pytest.raises(UserError, match="no row was answered by all models"):
        compared([base, none])


def test_equal_answers_and_equal_scores_are_reported_as_such(tmp_path):
    items = unresolved([1, 0, 1, 0])
    base, same = (write_folder(tmp_path / name, items, name) for name in "bs")
    reworded = [entry.model_copy(update={"response": "other words"}) for entry in items]
    result = compared([base, same, write_folder(tmp_path / "o", reworded, "o")])
    assert [entry["no_interval"] for entry in result["parts"][0]["tuned"]] == ["no score differs"] * 2
    assert [model["same_answers"] for model in result["tuned"]] == [True, False]
    lines = list(comparison_notes(result))
    assert lines == [
        "s gives the same answers as b, word for word: is it the same model?",
        "o: no score differs from b's, so there is nothing to compare.",
    ]


def test_a_single_question_has_a_difference_and_no_interval(tmp_path):
    result = compared(folders(tmp_path, [0, 1, 0], [1, 1, 1], [0, 0, 0], questions="aaa"))
    difference = result["parts"][0]["tuned"][0]
    assert (difference["delta"], difference["delta_ci95"]) == (pytest.approx(2 / 3), None)
    assert result["best"] is None


def test_several_answers_to_a_row_are_averaged(tmp_path):
    questions = "abc"
    base = [item(r, q, s, sample=k) for r, q in enumerate(questions) for k, s in enumerate((0, 1))]
    tuned = [item(r, q, s, sample=k) for r, q in enumerate(questions) for k, s in enumerate((1, 1, 0, 1))]
    paths = [write_folder(tmp_path / "b", base), write_folder(tmp_path / "t", tuned, "t")]
    rows = pair_rows(read_comparable(paths[0], paths[1:]))
    assert [row.scores for row in rows] == [(0.5, 0.75)] * 3


def test_the_best_of_several_is_reported_with_what_choosing_adds(tmp_path):
    paths = [write_folder(tmp_path / "base", make_items(0.4), "b")]
    paths += [write_folder(tmp_path / f"t{s}", make_items(0.4, seed=s), f"t{s}") for s in (1, 2, 3, 4)]
    result = compared(paths)
    deltas = [difference["delta"] for difference in result["parts"][0]["tuned"]]
    best = result["best"]
    assert best["name"] == f"t{1 + int(np.argmax(deltas))}"
    assert best["delta"] == pytest.approx(max(deltas))
    assert 0 < best["selection_bias"] < 0.1
    assert best["corrected"] == pytest.approx(best["delta"] - best["selection_bias"])
    assert best["ci95"][0] < best["corrected"] < best["ci95"][1]


def test_real_questions_are_paired_and_clustered(real, tmp_path):
    """Gemma's published answers against the same with the right answer given to every fifth question."""
    source = real / "responses" / "gemma-1.1-7b-it"
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("free-form", "multiple-choice"):
        rows = [json.loads(line) for line in (source / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for row in rows:
            question = json.dumps([row["context"], row["prompt"], row.get("options")])
            if int(hashlib.sha256(question.encode()).hexdigest(), 16) % 5 == 0:
                row["response"] = "ABCDEFGH"[row["target"][0]] if "options" in row else row["target"][0]
        (changed / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, responses in {"base": source, "tuned": changed}.items():
        evaluated(real, tmp_path / name, profile="strict", responses=str(responses))
    result = compared([tmp_path / "base", tmp_path / "tuned"])
    assert (result["rows"], result["questions"], result["clusters"]) == (1000, 446, 430)
    overall = result["parts"][0]
    assert overall["base"]["score"] == pytest.approx(0.268)
    assert overall["base"]["se"] == pytest.approx(0.0245, abs=5e-5)  # naive: 0.0140
    difference = overall["tuned"][0]
    assert difference["worse"] == 0 < difference["better"] == difference["wrong_to_right"]
    assert difference["delta_ci95"][0] < difference["delta"] < difference["delta_ci95"][1]
    naive = np.sqrt(difference["better"] / 1000 * (1 - difference["better"] / 1000) / 1000)
    assert difference["delta_se"] > 1.3 * naive
    assert result["power"][0]["variance_within"] < 1e-3  # equal questions have equal answers


# ---- power


def test_power_foretells_other_designs(tmp_path):
    paths = [write_folder(tmp_path / "b", make_items(0.4, questions=200), "b")]
    paths.append(write_folder(tmp_path / "t", make_items(0.4, questions=200, seed=1, shift=0.1), "t"))
    result = compared(paths, difference=0.05, split_sizes={"twice as many": [2] * 800})
    (power,) = result["power"]
    single, twice = power["by_samples"][0], power["splits"][0]
    assert single["se"] == pytest.approx(result["parts"][0]["tuned"][0]["delta_se"], rel=0.05)
    assert single["detectable"] == pytest.approx(power["detectable"], rel=0.05)
    assert twice["se"] == pytest.approx(single["se"] / math.sqrt(2), rel=0.01)
    assert [d["se"] for d in power["by_samples"]] == sorted((d["se"] for d in power["by_samples"]), reverse=True)
    (again,) = compared(paths, difference=power["detectable"])["power"]
    assert again["power"] == pytest.approx(0.8, abs=0.01)


def test_the_number_of_samples_needed_is_reported_if_samples_can_help(tmp_path):
    # Answers of one question scatter and questions do not differ: more answers help, and as many as are told.
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 2, 400).astype(float).tolist() for _ in range(2)]
    noisy = [item(row, f"q{row // 2}", score) for row, score in enumerate(scores[0])]
    tuned = [item(row, f"q{row // 2}", score) for row, score in enumerate(scores[1])]
    paths = [write_folder(tmp_path / "b", noisy), write_folder(tmp_path / "t", tuned, "t")]
    (power,) = compared(paths, difference=0.04)["power"]
    assert 1 < power["samples_needed"] < 100
    # Answers of one question agree wholly: none do.
    steady = [item(row, f"q{row // 2}", scores[1][row // 2]) for row in range(400)]
    still = [item(row, f"q{row // 2}", scores[0][row // 2]) for row in range(400)]
    paths = [write_folder(tmp_path / "b2", still), write_folder(tmp_path / "t2", steady, "t")]
    (power,) = compared(paths, difference=0.04)["power"]
    assert power["samples_needed"] is None
    assert power["variance_within"] == pytest.approx(0)
    # Every question once: nothing is known.
    once = [write_folder(tmp_path / n, [item(r, f"q{r}", s[r]) for r in range(400)], n)
            for n, s in zip("xy", scores, strict=True)]  # fmt: skip
    (power,) = compared(once, difference=0.04)["power"]
    assert (power["variance_within"], power["samples_needed"], power["by_samples"]) == (None, None, [])


def test_power_looks_at_as_many_answers_as_both_have(tmp_path):
    single = [write_folder(tmp_path / n, make_items(0.4, seed=s, samples=1), n) for s, n in enumerate("ab")]
    more = write_folder(tmp_path / "b3", make_items(0.4, seed=1, samples=3), "b3")
    (power,), (again,) = compared(single)["power"], compared([single[0], more])["power"]
    assert power["samples"] == again["samples"] == 1
    assert again["variance_within"] == pytest.approx(power["variance_within"])
    same = [write_folder(tmp_path / n, make_items(0.4, seed=s, samples=3), n) for s, n in enumerate("cd")]
    assert compared(same)["power"][0]["samples"] == 3


def test_other_splits_are_counted_from_the_data_folder(shared, tmp_path):
    data = shared / "data" / "mixeval"
    sizes = other_splits(data, {"version": "2024-08-11", "split": "hard"})
    assert list(sizes) == ["hard 2024-06-01"]
    assert (len(sizes["hard 2024-06-01"]), sum(sizes["hard 2024-06-01"])) == (430, 1000)
    for folder in (data, tmp_path):
        with pytest.raises(UserError, match="holds no split of MixEval except the compared one"):
            other_splits(folder, {"version": "2024-06-01", "split": "hard"})


# ---- what changed


def test_flips_are_the_answers_whose_score_changed(tmp_path):
    paths = folders(tmp_path, [0, 1, 0.3, 0.6, 1], [1, 0, 0.4, 0.6, 0.8])
    kinds = [
        (tuned.row, change_kind(base.score, tuned.score))
        for _, base, tuned in changed_answers(read_comparable(*paths[:1], paths[1:]))
    ]
    assert kinds == [(0, "wrong to right"), (1, "right to wrong"), (4, "worse"), (2, "better")]


def test_names_distinguish_folders(tmp_path):
    assert model_names([tmp_path / "base", tmp_path / "tuned"]) == ["base", "tuned"]
    deep = [tmp_path / "one" / "eval", tmp_path / "two" / "eval"]
    assert model_names(deep) == ["one/eval", "two/eval"]


# ---- refused


def pair_with(tmp_path: Path, **changes: object) -> list[Path]:
    items = make_items(0.4, questions=4)
    return [write_folder(tmp_path / "b", items, "b"), write_folder(tmp_path / "t", items, "t", **changes)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": "2024-08-11"}, "version is '2024-08-11' in one and '2024-06-01' in the other"),
        ({"profile": "faithful"}, "profile is 'faithful' in one and 'strict'"),
        ({"system": "Be brief."}, "system is 'Be brief.' in one and None"),
        ({"split": "full"}, "split is 'full' in one and 'hard'"),
        ({"limit": 5}, "limit is 5 in one and None"),
        ({"judge": JudgeUsed(kind="rule")}, "judge.kind is 'rule' in one and 'model' in the other \\(and judge.model,"),
        ({"data": {"free-form.json": "1" * 64}}, "data is "),
    ],
)
def test_results_of_another_evaluation_are_refused_by_name(tmp_path, changes, named):
    base, tuned = pair_with(tmp_path, **changes)
    with pytest.raises(UserError, match=f"t and .*b cannot be compared: {named}"):
        read_comparable(base, [tuned])


def test_another_judge_is_refused_by_name(tmp_path):
    judge = JudgeUsed(kind="model", model="other-judge", options={"temperature": 0}, prompts_sha256="0" * 64)
    base, tuned = pair_with(tmp_path, judge=judge)
    with pytest.raises(
        UserError, match=r"judge\.model is 'other-judge' in one and 'world-judge' in the other; evaluate"
    ):
        read_comparable(base, [tuned])


def test_different_rows_are_refused(tmp_path):
    items = make_items(0.4, questions=4)
    base, less = write_folder(tmp_path / "b", items), write_folder(tmp_path / "t", items[:-3], "t")
    with pytest.raises(
        UserError, match=r"different rows: 3 only in one of them, first multiple-choice 5, only in .*b;"
    ):
        pair_rows(read_comparable(base, [less]))
    with pytest.raises(UserError, match=r"3 only in one of them, first multiple-choice 5, only in .*b;"):
        pair_rows(read_comparable(less, [base]))
    changed = [entry.model_copy(update={"question": "new"}) if entry.row == 2 else entry for entry in items]
    with pytest.raises(UserError, match="free-form 2 asks different questions"):
        pair_rows(read_comparable(base, [write_folder(tmp_path / "u", changed, "u")]))


def test_the_same_folder_twice_and_a_copy_are_refused(tmp_path):
    base, tuned = pair_with(tmp_path)
    with pytest.raises(UserError, match="given twice"):
        read_comparable(base, [tuned, base / ".." / "b"])
    copy = write_folder(tmp_path / "copy", make_items(0.4, questions=4), "b")
    with pytest.raises(UserError, match="is a copy of"):
        read_comparable(base, [copy])
    with pytest.raises(UserError, match="at least one TUNED"):
        read_comparable(base, [])


def test_no_results_and_unfinished_ones_are_refused(tmp_path):
    base, tuned = pair_with(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no score\.json"):
        read_comparable(base, [tmp_path / "empty"])
    (tuned / "score.json").unlink()
    with pytest.raises(UserError, match=r"finished `apo eval mixeval`"):
        read_comparable(base, [tuned])


# ---- the docs


def test_the_tables_of_coverage_are_what_was_measured():
    file = ROOT / "tests" / "benchmarks" / "results" / "intervals.json"
    raw = json.loads(file.read_text("utf-8"))
    ((_, _, (head, *rows)),) = tables("coverage")
    designs = [name for name, measured in raw.items() if isinstance(measured, dict) and "0.5" in measured]
    expected = [
        [f"{100 * raw[design][accuracy][kind]:.1f}" for accuracy in head[2:]]
        for design in designs
        for kind in ("score", "symmetric", "difference", "gain")
    ]
    assert [row[2:] for row in rows] == expected
    assert len(expected) == 24
    ((_, _, (_, *rows)),) = tables("best of")
    keys = {"true_bias": ".2f", "estimated_bias": ".2f"}
    for row, (name, measured) in zip(rows, raw["best_of"].items(), strict=True):
        shares = [f"{100 * measured[key]:.1f}" for key in ("holds", "uncorrected_holds")]
        assert row == [name, *(format(measured[key], how) for key, how in keys.items()), *shares]


# ---- the command


def test_the_command_writes_numbers_and_a_page_and_prints_both(tmp_path):
    paths = [write_folder(tmp_path / "base", make_items(0.4), "b")]
    paths += [write_folder(tmp_path / f"t{s}", make_items(0.4, seed=s, shift=0.3), f"t{s}") for s in (1, 2)]
    result = CliRunner().invoke(app, ["compare", *map(str, paths), "--difference", "5"], catch_exceptions=False)
    assert result.exit_code == 0
    numbers = json.loads((tmp_path / "compare" / "compare.json").read_text("utf-8"))
    difference = numbers["parts"][0]["tuned"][0]
    assert f"{100 * difference['delta']:+.1f}" in result.output
    assert "The best of 2" in result.output
    assert numbers["power"][0]["difference"] == 0.05
    assert (tmp_path / "compare" / "compare.html").stat().st_size > 20_000
    assert read_results(paths[0]).score.overall == pytest.approx(numbers["base"]["overall"])


def test_at_80_columns_nothing_of_the_table_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "Llama-3-8B-Instruct-apo-zero-[clair]-seed-3"
    paths = [write_folder(tmp_path / "base", make_items(0.4), "base")]
    names = ((1, long), (2, "t2"))
    paths += [write_folder(tmp_path / name, make_items(0.4, seed=seed, shift=0.3), name) for seed, name in names]
    result = CliRunner().invoke(app, ["compare", *map(str, paths)], catch_exceptions=False)
    assert result.exit_code == 0
    table = result.output.partition("The best of 2")[0].splitlines()
    assert "…" not in result.output
    assert max(map(len, table)) <= 80
    for head in ("score", "delta", "95 % interval", "corrected", "better,", "worse"):
        assert any(head in line for line in table[:4]), head
    beside = re.compile(r"\s{2,}")
    first = "".join(beside.split(line)[0] for line in table)
    assert long in first
    for entry in json.loads((tmp_path / "compare" / "compare.json").read_text("utf-8"))["parts"]:
        for difference in entry["tuned"] if entry["level"] != "benchmark" else ():
            low, high = (f"{100 * end:+.1f}" for end in difference["delta_ci95"])
            texts = [f"{100 * difference['score']:.1f}", f"{100 * difference['delta']:+.1f}", f"{low} to {high}"]
            cells = [*texts, f"{difference['better']}, {difference['worse']}"]
            assert any(set(cells) <= set(beside.split(line.strip())) for line in table), cells


def test_the_command_refuses_in_one_line_before_it_writes(tmp_path):
    base, tuned = pair_with(tmp_path, profile="faithful")
    with pytest.raises(UserError, match="profile"):
        CliRunner().invoke(app, ["compare", str(base), str(tuned)], catch_exceptions=False)
    assert not (tmp_path / "compare").exists()
