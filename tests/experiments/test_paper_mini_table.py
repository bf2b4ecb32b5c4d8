"""The mini grid's tables: intervals by hand, verdicts by their rule, and a page from the file of results alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from clair.core.errors import UserError
from clair.core.statistics import Estimate
from clair.core.student_t import t_quantile
from recipes.experiments.paper_mini import plots, results, table
from recipes.experiments.paper_mini.cells import Cell, Design
from recipes.experiments.paper_mini.claims import (
    CLAIMS,
    Claim,
    Compared,
    better_apo,
    compare,
    gains,
    interval,
    maximum_difference,
    verdict_of,
)
from recipes.experiments.paper_mini.grid import EVALUATION_METRICS
from recipes.experiments.paper_mini.rows import rate_rows

UP, DOWN = Compared(("a", "dpo"), None), Compared(("a", "sft"), None, above=False)


def estimate(lo, hi):
    return Estimate((lo + hi) / 2, 0.1, lo, hi, 10, 5)


@pytest.mark.parametrize(
    ("compared", "measured", "verdict"),
    [
        ((UP,), [(1, 2)], "reproduced"),
        ((UP,), [(-2, -1)], "not reproduced"),
        ((UP,), [(-1, 1)], "undecided"),
        ((UP,), [(0, 0)], "undecided"),
        ((DOWN,), [(-2, -1)], "reproduced"),
        ((DOWN,), [(1, 2)], "not reproduced"),
        ((UP, DOWN), [(1, 2), (-2, -1)], "reproduced"),
        ((UP, DOWN), [(1, 2), (-1, 1)], "undecided"),
        ((UP, DOWN), [(1, 2), (1, 2)], "not reproduced"),
        ((UP, DOWN), [(1, 2), None], "not measured"),
    ],
)
def test_the_verdict_follows_the_intervals(compared, measured, verdict):
    assert verdict_of(Claim("", compared), [bounds and estimate(*bounds) for bounds in measured]) == verdict


def test_every_claim_is_about_cells_of_the_grid():
    design = Design()
    names = {(data, objective) for data in design.data for objective in design.objectives}
    used = {
        name
        for claim in CLAIMS
        for comparison in claim.compared
        for name in (comparison.left, comparison.right)
        if name
    }
    assert len(used) >= 8
    assert used <= names


def run(seed, *checkpoints, data="clair", objective="apo_zero", start=0.0, rewards=True):
    """A run whose checkpoints answer so; the winners' log-likelihood rises by the number of right answers. Of its two
    held-out pairs one is in the right order and one is a tie."""
    pairs = [{"logps/chosen": start + right.count("1"), "logps/rejected": -1.0} for right in checkpoints]
    for values in pairs:
        values |= {name: 0.5 for name in EVALUATION_METRICS if name not in values and rewards}
    begin = {"logps/chosen": start, "logps/rejected": 0.0}
    looks = {name: [values[name] for values in (begin, *pairs)] for name in begin}
    moved = {"chosen_logratio": [2.0, -1.0], "rejected_logratio": [-2.0, -1.0], "chosen_logratio_shared": [0.5, -0.5],
             "rejected_logratio_shared": [-1.0, 0.0], "chosen_kl": [0.5, 1.0], "rejected_kl": [2.0, 3.0]}  # fmt: skip
    cell = Cell(data, objective, 1e-5, 0.1, seed, len(checkpoints), "grid")
    return {
        "kind": "run", "world": "w", "key": cell.key("w"), **asdict(cell),
        "start": begin, "looks": {"step": [10 * index for index in range(len(pairs) + 1)], **looks}, "moved": moved,
        "checkpoints": [
            {"epoch": index + 1, "right": right, "wording": "e" * len(right), "words": 3.0, "pairs": values}
            for index, (right, values) in enumerate(zip(checkpoints, pairs, strict=True))
        ],
    }  # fmt: skip


def test_gains_are_of_the_same_seed_and_over_checkpoints():
    left, right = [run(0, "10", "11"), run(1, "00", "00")], [run(0, "00", "01"), run(2, "11", "11")]
    assert gains(left, right, [0.0, 0.0]) == [[1.0, 0.0]]  # seed 0 alone is in both
    assert gains(left, None, [1.0, 0.0]) == [[0.0, 0.5], [-1.0, 0.0]]


def test_the_interval_adds_the_variance_of_seeds_to_that_of_questions():
    result = interval([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], ["a", "b", "c", "d"])
    # Questions: 1, .5, 1, .5, mean .75, se^2 = 4 * .0625 / .75 / 16. Seeds: .5 and 1, se^2 = 2 * .0625 / .5 / 4.
    a, b = 4 * 0.0625 / 0.75 / 16, 2 * 0.0625 / 0.5 / 4
    df = (a + b) ** 2 / (a**2 / 3 + b**2 / 1)
    assert result.mean == 0.75
    assert result.se == pytest.approx(math.sqrt(a + b))
    assert result.hi == pytest.approx(0.75 + t_quantile(0.975, df) * math.sqrt(a + b))
    single = interval([[1.0, 0.0, 1.0, 0.0]], ["a", "b", "c", "d"])
    assert single.se == pytest.approx(math.sqrt(4 * 0.25 / 0.75) / 4)


def test_likelihoods_are_compared_with_the_start_over_seeds_and_one_seed_says_nothing():
    contrast = Compared(("clair", "apo_zero"), None, of="likelihood")
    cells = {("clair", "apo_zero"): [run(0, "00", "11", start=-9.0), run(1, "11", "11", start=-7.0)]}
    difference = compare(contrast, cells, [0.0, 0.0], ["a", "b"])
    assert (difference.mean, difference.se) == (2.0, 0.0)
    assert compare(contrast, {("clair", "apo_zero"): [run(0, "11")]}, [0.0, 0.0], ["a", "b"]) is None
    assert compare(contrast, {}, [0.0, 0.0], ["a", "b"]) is None


def test_the_better_of_two_is_corrected_for_having_been_chosen():
    cells = {("clair", "apo_zero"): [run(0, "11110000")], ("clair", "apo_down"): [run(0, "11111100")]}
    clusters = list("abcdefgh")
    best = better_apo(cells, [0.0] * 8, clusters)
    assert best is not None
    assert (best[0], best[1].observed) == ("apo_down", 0.75)
    assert best[1].lo < best[1].corrected <= 0.75
    assert better_apo({("clair", "apo_zero"): [run(0, "1")]}, [0.0], ["a"]) is None


def test_by_the_maxima_each_side_has_its_own_best_checkpoint_of_the_means_over_seeds():
    left, right = [run(0, "11", "00"), run(1, "00", "10")], [run(0, "00", "10"), run(1, "00", "10")]
    assert maximum_difference(left, right, [0.0, 1.0]) == 0.0  # half right at the first, and at the last
    assert maximum_difference(left, None, [0.0, 0.0]) == 0.5


def test_a_curve_is_a_mean_over_seeds_and_a_reward_begins_at_0():
    runs = [run(0, "00", "11", start=-9.0), run(1, "11", "11", start=-7.0), {**run(2, "11"), "checkpoints": []}]
    curve = plots.curve(runs, "chosen", reward=False)
    assert curve == plots.Curve([0.0, 1.0, 2.0], [-8.0, -7.0, -6.0], [-9.0, -9.0, -7.0], [-7.0, -5.0, -5.0])
    curve = plots.curve(runs, "chosen", reward=True)
    assert curve is not None
    assert curve.mean == pytest.approx([0.0, 0.1, 0.2])
    assert plots.curve(runs[2:], "chosen", reward=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("reward", [True, False])
def test_a_picture_is_drawn_of_cells_with_and_without_runs(tmp_path, reward):
    cells = {("clair", "dpo"): [run(0, "00", "11")], ("clair", "kto"): [{**run(0, "11"), "checkpoints": []}]}
    plots.draw(cells, tmp_path / "p.png", reward=reward)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# ---- the page

QUESTIONS = 8


def write_results(file, *, leave_out=0):
    """A whole small grid: SFT knows nothing of rewards, one run broke off, one was for tuning."""
    design = Design(seeds=(0, 1), epochs=2, learning_rates=(1e-5,), betas=(0.1,), heldout=QUESTIONS)
    contrast = {"jaccard": 0.5, "levenshtein": 7.0, "kept": 1, "prefix": 1, "length_ratio": 1.25}
    counts = {"train": 90, "test": 9, "train_tokens": 900, "contrast": contrast}
    world = {
        "kind": "world", "world": "w", "design": asdict(design), "data": dict.fromkeys(design.data, counts),
        "skills": ["sums", "edit"] * 4, "templates": [f"t{n // 2}" for n in range(QUESTIONS)],
        "base": {"right": "10101010", "wording": "ppppdddd", "words": 2.5},
    }  # fmt: skip
    last = "11111110", "11111100"
    runs = [
        run(seed, "11101010", last[seed], data=data, objective=objective, rewards=objective != "sft")
        for data in design.data for objective in design.objectives for seed in design.seeds
    ]  # fmt: skip
    runs[-1] |= {"checkpoints": [], "broke_off": "the loss is no number"}
    runs[-2] |= {"checkpoints": [], "broke_off": "the loss is no number"}
    for line in [{"kind": "world", "world": "old"}, world, *runs[leave_out:]]:
        results.append(file, line)
    return world, runs


def test_the_page_is_made_from_the_results_alone(tmp_path):
    file = tmp_path / "runs.jsonl"
    write_results(file)
    lines = results.read(file)
    world, runs = results.world_of(lines, file), results.runs_of(lines, "w")
    text = table.page(world, runs) + table.tables_page(world, runs)
    assert "answers 50.0% of 8 held-out tasks right" in " ".join(text.split())
    # 5, and then 7 or 6 of 8 right, from 4: mean +21.875 points, maximum +31.25.
    assert "| clair | apo_zero | 2 | +21.9 [" in text
    assert "] | +31.2 | +" in text
    assert "| stronger | apo_down | 0 | broke off | broke off | broke off | 1e-05 | 0.1 |" in text
    assert "|  | before | 100.0 | 0.0 | 0% | 50% | 50% | 2.5 |" in text
    assert "| clair | sft | 87.5 | 75.0 | 100% | 0% | 0% | 3.0 |" in text
    # One pair of two in the right order, the other a tie; margin 0.1 * (4 + 0) / 2; nats of all, shared, other tokens.
    assert "| clair | sft | 75% [" in text
    assert "] | +0.50 | +0.00 | +0.50 | -1.50 | -0.50 | -1.00 | 50% | 0.75 |" in text
    assert "| +0.20 [" in text
    assert "| clair | 90 | 9 | 900 | 0.50 | 7.0 | 1.25 |" in text
    assert "| CLAIR with APO-zero makes the model better | clair apo_zero − before, points; expected above 0 |" in text
    assert text.count("undecided |") >= 3  # cells that do alike
    # Winners rise under APO-zero, and under DPO too; all gain alike, so that no comparison of cells is decided.
    assert "**8 claims: 1 reproduced, 1 not reproduced, 6 undecided.**" in text
    assert "CLAIR with the better of APO-zero and APO-down (APO-zero) gains" in text
    assert "measured 3 times in a run" in text
    assert "| off_policy | +0.0 [+0.0, +0.0] | +0.0 |" in text  # SFT and APO-zero
    assert "Before training, 50% of the greedy answers are worded plainly" in " ".join(text.split())
    assert "nan" not in text


def test_rates_that_were_tried_stand_side_by_side():
    tried = [run(100, "01", "11"), {**run(100, "11"), "learning_rate": 3e-5, "checkpoints": []}, run(0, "00")]
    runs = {
        str(index): {**rate_run, "purpose": "grid" if index == 2 else "learning_rate"}
        for index, rate_run in enumerate(tried)
    }
    rows = rate_rows(runs, [1e-5, 3e-5, 9e-5])
    assert rows == [
        ["pairs", "objective", "1e-05", "3e-05", "9e-05"],
        ["clair", "apo_zero", "100.0 (+2.0)", "broke off", ""],
    ]


def test_only_a_whole_full_grid_is_written(tmp_path, monkeypatch, capsys):
    file = tmp_path / "runs.jsonl"
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "PAGE", tmp_path / "paper.md")
    monkeypatch.setattr(table, "TABLES", tmp_path / "tables.md")
    monkeypatch.setattr(table.results, "COMMITTED", file)
    monkeypatch.setattr("sys.argv", ["table", "--write"])
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda cells, path, reward: drawn.append((len(cells), path.name, reward)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="holds no results"):
        table.main()
    _, runs = write_results(file, leave_out=1)
    with pytest.raises(SystemExit, match="1 or more runs are missing"):
        table.main()
    assert not (tmp_path / "paper.md").exists()
    results.append(file, runs[0])
    table.main()
    assert "40 runs are in them" in (tmp_path / "paper.md").read_text("utf-8")
    assert all(
        f"\n## {name}\n" in (tmp_path / "tables.md").read_text("utf-8") for name in ("Answers", "Held-out pairs")
    )
    assert drawn == [(20, name, reward) for name, reward in table.PICTURES.items()]
    assert all(f"](images/{name})" in (tmp_path / "paper.md").read_text("utf-8") for name in table.PICTURES)
    assert json.loads(file.read_text("utf-8").splitlines()[0])["world"] == "old"


def test_a_small_grid_is_never_written():
    with pytest.raises(UserError, match="shows the full grid only"):
        table.check_complete({"design": asdict(Design())}, {}, small=True)
