"""`apo calibrate` and `apo certify`: from files to a filter that `clair` applies, and what is refused."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from typer.testing import CliRunner

from apo.guarantees.calibrate import calibrate, certify, filter_above, one_row_per_prompt, read_audit, read_ids
from clair.core.errors import UserError
from clair.data.dataset import read_rows
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from recipes.world.tasks import distinct_tasks
from tests.apo.recipe_command import failure, run


def scored(n: int, seed: int = 0, noise: float = 1.2) -> list[dict]:
    """Pairs of the embedded world with a noisy judge's whole-number scores; 3 in 10 have a wrong winner."""
    rng = random.Random(seed)
    rows = []
    for task in distinct_tasks("train", n, 0):
        bad = rng.random() < 0.3
        chosen, rejected = (task.wrong, task.right) if bad else (task.right, task.wrong)
        scores = [round(rng.gauss(6 if text == task.right else 4, noise)) for text in (chosen, rejected)]
        rows.append(
            {
                "id": task.id,
                "prompt": task.prompt,
                "answers": [chosen, rejected],
                "score_chosen": scores[0],
                "score_rejected": scores[1],
                "bad": bad,
            }
        )
    return rows


@pytest.fixture
def folder(tmp_path):
    """A dataset folder built from scored answers (highest against lowest), with its audit of every second row."""
    rows = [row for row in scored(120, noise=2.5) if row["score_chosen"] > row["score_rejected"]]
    source = [{**row, "scores": [row["score_chosen"], row["score_rejected"]]} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
    recipe = {
        "pipeline": "judged",
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "out": str(tmp_path / "pairs"),
    }
    build(BuildConfig.model_validate(recipe))
    audit = "".join(json.dumps({"id": row["id"], "bad": row["bad"]}) + "\n" for row in rows[::2])
    (tmp_path / "audit.jsonl").write_text(audit)
    return tmp_path / "pairs"


def test_the_command_sets_a_filter_says_its_promise_and_clair_keep_applies_it(folder, tmp_path):
    decisions = tmp_path / "decisions.json"
    result = run("calibrate", dataset=folder, audit=tmp_path / "audit.jsonl", alpha=0.1, decisions=decisions)
    assert result.exit_code == 0, result.output
    assert "at most 0.1 of new pairs are then kept and bad, on average over draws of" in result.output
    assert "This is not the share of bad pairs among the kept" in result.output
    above = float(result.output.split("gap: {above: ")[1].split("}")[0])
    rows = list(read_rows(folder))
    expected = [row["id"] for row in rows if row["score_chosen"] - row["score_rejected"] > above]
    assert 0 < len(expected) < len(rows)
    from clair.cli import app as clair

    assert CliRunner().invoke(clair, ["keep", str(folder), str(decisions)]).exit_code == 0
    assert [row["id"] for row in read_rows(folder)] == expected


def test_both_splits_of_a_scored_folder_are_calibrated_and_certified(folder, tmp_path):
    """`apo reward score --out FOLDER` writes train.jsonl and test.jsonl."""
    rows = list(read_rows(folder))
    (tmp_path / "scored").mkdir()
    for name, part in (("train", rows[:-30]), ("test", rows[-30:])):
        (tmp_path / f"scored/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    result = run("calibrate", dataset=tmp_path / "scored", audit=tmp_path / "audit.jsonl", alpha=0.1)
    assert f"of {len(rows):,} pairs" in result.output
    assert f"of {len(rows):,} units" in run("certify", dataset=tmp_path / "scored", property="floor").output
    (tmp_path / "audit.jsonl").write_text(json.dumps({"id": rows[-1]["id"], "bad": False}))
    recipe = {"dataset": folder, "audit": tmp_path / "audit.jsonl", "trained_on": [tmp_path / "scored"]}
    assert f"trained on {rows[-1]['id']!r}" in failure("calibrate", **recipe)


def test_the_printed_filter_is_one_that_a_recipe_takes(folder, tmp_path):
    output = run("calibrate", dataset=folder, audit=tmp_path / "audit.jsonl", alpha=0.1).output
    from clair.core.recipe import parse_yaml

    filters = parse_yaml(output[output.index("filters:") :])["filters"]
    recipe = {
        "pipeline": "judged",
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "filters": filters,
        "out": str(tmp_path / "filtered"),
    }
    build(BuildConfig.model_validate(recipe))
    above = filters["gap"]["above"]
    expected = {row["id"] for row in read_rows(folder) if row["score_chosen"] - row["score_rejected"] > above}
    assert {row["id"] for row in read_rows(tmp_path / "filtered")} == expected


def test_too_few_audited_prompts_are_reported_before_anything_is_written(folder, tmp_path):
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()[:8]
    (tmp_path / "small.jsonl").write_text("\n".join(lines))
    decisions = tmp_path / "d.json"
    message = failure("calibrate", dataset=folder, audit=tmp_path / "small.jsonl", decisions=decisions)
    assert message == "no finite threshold: 8 audited prompts are too few for alpha 0.1, which needs 9"
    assert not decisions.exists()


def test_an_audit_of_what_the_judge_was_trained_on_is_refused(folder, tmp_path):
    audit = tmp_path / "audit.jsonl"
    message = failure("calibrate", dataset=folder, audit=audit, trained_on=[audit])
    assert "the judge was trained on" in message
    assert " and " in message
    message = failure("certify", dataset=folder, trained_on=[folder])
    assert "too good to calibrate on" in message
    # The judge's own folder says what it was trained on, too.
    (tmp_path / "reward").mkdir()
    first = read_audit(tmp_path / "audit.jsonl")[0]["id"]
    (tmp_path / "reward/reward.json").write_text(json.dumps({"trained_on": [first]}))
    assert read_ids(tmp_path / "reward") == [first]
    message = failure("calibrate", dataset=folder, audit=audit, trained_on=[tmp_path / "reward"])
    assert f"trained on {first!r}: its scores" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1: not JSON"),
        ('{"bad": true}', "line 1: no id"),
        ('{"id": "a", "bad": "yes"}', "audit row 'a': bad is 'yes'"),
        ('{"id": "a", "bad": true}\n{"id": "a", "bad": false}', "'a' is marked both good and bad"),
        ('{"id": "nobody", "bad": true}', "row 'nobody': no column 'score_chosen'"),
        ('{"id": "a", "bad": true, "score_chosen": "7", "score_rejected": 1}', "column 'score_chosen' is '7'"),
        ("", "is empty"),
    ],
)
def test_an_audit_that_cannot_be_used_is_one_line(folder, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(line)
    assert message in failure("calibrate", dataset=folder, audit=tmp_path / "bad.jsonl")


def test_wrong_settings_are_reported(folder, tmp_path):
    audit = tmp_path / "audit.jsonl"
    assert "joint" in failure("calibrate", dataset=folder, audit=audit, guarantee="joined")
    assert "rises" in failure("certify", dataset=folder, property="rise")
    assert "alpha" in failure("calibrate", dataset=folder, audit=audit, alpha=2)
    unused = failure("calibrate", dataset=folder, audit=audit, delta=0.2)
    assert "delta is for guarantee: precision" in unused
    assert "audit nowhere.jsonl does not exist" in failure("calibrate", dataset=folder, audit="nowhere.jsonl")
    assert "did you mean 'score_chosen'" in failure("certify", dataset=folder, of="score_choosen")


def test_one_row_counts_for_each_prompt_whatever_the_order():
    rows = [{"id": str(n), "prompt": f"p{n % 3}"} for n in range(9)] + [{"id": "alone"}]
    units = one_row_per_prompt(rows)
    assert sorted(unit.get("prompt", "") for unit in units) == ["", "p0", "p1", "p2"]
    assert one_row_per_prompt(rows[::-1]) == units


def test_ten_audited_pairs_of_one_prompt_are_one_unit():
    rows = [
        {"id": str(n), "prompt": "the same", "score_chosen": 1, "score_rejected": 0, "bad": False} for n in range(10)
    ]
    with pytest.raises(UserError, match="1 audited prompts are too few"):
        calibrate(rows, rows, 0.1)


def test_an_audit_may_bring_its_own_scores():
    pairs = [{"id": f"d{n}", "prompt": str(n), "score_chosen": n, "score_rejected": 0} for n in range(10)]
    audit = [{"id": str(n), "bad": n < 5, "score_chosen": float(n), "score_rejected": 0.0} for n in range(19)]
    calibration = calibrate(pairs, audit, 0.1)
    # One of 19 may be kept and bad: the second largest gap of the bad ones is 3.
    assert calibration.above == 3.0
    assert calibration.accepted == tuple(f"d{n}" for n in range(4, 10))
    assert calibration.recipe() == "filters:\n  gap: {above: 3.0}\n"
    assert calibrate(pairs, [{**row, "bad": False} for row in audit], 0.1).recipe() == ""


def test_precision_needs_scores_that_the_audit_did_not_choose():
    pairs = scored(400)
    with pytest.raises(UserError, match="every pair is in the audit"):
        calibrate(pairs, pairs, 0.1, "precision")
    with pytest.raises(UserError, match="no threshold could be shown"):
        calibrate(pairs, pairs[:25], 0.05, "precision")
    calibration = calibrate(pairs, pairs[:200], 0.15, "precision")
    assert "at most 0.15 of the kept are then bad, with a probability of at least 0.9" in calibration.promise


def test_a_certificate_by_hand_and_its_band_as_a_filter():
    # 19 prompts, alpha 0.1: one may fail. Revisions fall by 0.5 and 0.2; the second largest fall is the band.
    rows = [{"id": str(n), "score_chosen": 1.0, "score_rejected": 0.0} for n in range(17)]
    rows += [{"id": id, "score_chosen": 0, "score_rejected": fall} for id, fall in (("x", 0.5), ("y", 0.2))]
    certificate = certify(rows, 0.1)
    assert certificate.band.width == pytest.approx(0.2)
    assert certificate.unadjusted.mean == pytest.approx(2 / 19)
    assert (
        "score_chosen is never below score_rejected: as it is, it fails on 0.105 of 19 units" in certificate.summary()
    )
    assert filter_above(rows, certificate.band.width, "").dropped == ("x", "y")
    assert certify(rows, 0.1, "same", of="score_rejected", than="score_rejected").band.width == 0
    assert certify(rows, 0.1, "floor", of="score_chosen", bound=0.9).band.width == pytest.approx(0.9)
    assert certify(rows, 0.1, "ceiling", of="score_chosen", bound=0.9).band.width == pytest.approx(0.1)


def test_pairs_that_are_decided_for_the_rejected_answer_are_not_undecided(tmp_path):
    texts = {"chosen": "a", "rejected": "b"}
    gaps = [0.6] * 60 + [-0.6] * 30 + [0.0] * 10
    rows = [
        {**texts, "id": str(n), "prompt": str(n), "score_chosen": gap, "score_rejected": 0.0, "score_padded": gap}
        for n, gap in enumerate(gaps)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = run("certify", dataset=tmp_path / "rows.jsonl", property="same", than="score_padded").output
    assert "10 of 100 pairs are undecided, and 30 are decided for the rejected answer." in output


def test_an_output_that_is_a_folder_is_refused_before_any_work(folder, tmp_path):
    recipe = {"dataset": folder, "decisions": tmp_path}
    message = f"{tmp_path} is a folder, not a file; give the name of a file to write"
    assert message in failure("calibrate", **recipe, audit=tmp_path / "audit.jsonl")
    assert message in failure("certify", **recipe)
    assert message in failure("reward select", dataset=folder, model="m", out=tmp_path)
    assert message in failure("reward score", **recipe, reward="r", out=tmp_path / "s.jsonl")
    audit = tmp_path / "audit.jsonl"
    for command in ("distinguish", "reward fit", "reward curve"):
        assert f"{audit} is a file, not a folder" in failure(command, dataset=folder, model="m", out=audit)


def test_certify_prints_the_band_and_writes_decisions(folder, tmp_path):
    decisions = tmp_path / "d.json"
    result = run("certify", dataset=folder, of="score_rejected", than="score_chosen", alpha=0.2, decisions=decisions)
    assert result.exit_code == 0, result.output
    assert "pairs are undecided" in result.output
    assert set(json.loads(decisions.read_text())["decisions"].values()) <= {"keep", "drop"}
    assert "decisions is for property: rises and same" in failure(
        "certify", dataset=folder, property="floor", decisions=decisions
    )
    assert "alpha 0.001 needs 999 units, and there are" in failure("certify", dataset=folder, alpha=0.001)


def test_certify_reads_ladders_and_distances(folder, tmp_path):
    rows = [
        {**row, "id": f"{row['id']}", "score_padded": row["score_chosen"] - (number % 10 == 0)}
        for number, row in enumerate(read_rows(folder))
    ]
    dataset = tmp_path / "padded.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ladder = ["score_rejected", "score_chosen", "score_padded"]
    output = run("certify", dataset=dataset, ladder=ladder, alpha=0.05).output
    assert "no score falls from score_rejected to score_chosen to score_padded: as it is, it fails on" in output
    assert "score differences up to 1 decide nothing" in output
    output = run("certify", dataset=dataset, ladder=ladder, property="concave").output
    assert "scores gain less and less from score_rejected to score_chosen to score_padded: as it is" in output
    values = {"property": "lipschitz", "distance": "contrast.levenshtein", "bound": 0.25}
    output = run("certify", dataset=dataset, **values).output
    edits = [abs(r["score_chosen"] - r["score_rejected"]) - r["contrast"]["levenshtein"] / 4 > 0 for r in rows]
    assert f"it fails on {np.mean(edits):.3g} of {len(rows)} units" in output
    misspelled = {**values, "distance": "contrast.jacard"}
    assert "'contrast.jacard' is None" in failure("certify", dataset=dataset, **misspelled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"property": "concave"}, "concave needs a ladder of at least 3 columns, not 0"),
        ({"ladder": ["a"]}, "rises needs a ladder of at least 2 columns, not 1"),
        ({"ladder": ["a", "b"], "than": "c"}, "than is for a property without a ladder"),
        ({"property": "floor", "ladder": ["a", "b"]}, "ladder is for property: rises, same and concave"),
        ({"property": "lipschitz", "bound": 1}, "lipschitz needs distance, such as contrast.levenshtein"),
        ({"property": "lipschitz", "distance": "d"}, "and a bound above 0"),
        ({"distance": "d"}, "distance is for property: lipschitz"),
        ({"bound": 1}, "bound is for property: floor, ceiling and lipschitz"),
    ],
)
def test_settings_that_do_not_fit_the_property_are_refused(folder, settings, message):
    assert message in failure("certify", dataset=folder, **settings)


def test_a_property_that_leaves_no_pair_decided_is_refused(tmp_path):
    answers = {"chosen": "a", "rejected": "b", "score_rejected": 5}
    rows = [{"id": str(n), "prompt": str(n), "score_chosen": 1 + n % 2, **answers} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert failure("certify", dataset=tmp_path / "rows.jsonl") == (
        "score_chosen is never below score_rejected: it fails on 1 of 40 prompts, and the band of 4 leaves no pair "
        "decided; mend the score, or raise alpha above 0.1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_on_the_embedded_world_with_a_noisy_judge_the_promised_risk_holds_over_200_splits(alpha):
    rows = scored(1200)
    rng, joint, above = random.Random(0), [], 0
    for _ in range(200):
        rng.shuffle(rows)
        audit, unaudited = rows[:200], rows[200:]
        selected = set(calibrate(unaudited, audit, alpha).accepted)
        joint.append(sum(row["bad"] and row["id"] in selected for row in unaudited) / len(unaudited))
        above += joint[-1] > alpha
    se = float(np.std(joint)) / math.sqrt(200)
    print(f"alpha {alpha}: kept and bad {np.mean(joint):.4f} +- {se:.4f}, {above / 200:.0%} of the splits above alpha")
    assert np.mean(joint) <= alpha + 3 * se
    assert np.mean(joint) > alpha / 3
    assert above < 200
