"""Write results of evaluations as lines of a model card. Each result must be of the pushed model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apo.evaluation.pairs import RESULT as PAIRS
from apo.evaluation.results import SCORE, read_results
from apo.evaluation.tables import percent, percent_range
from apo.evaluation.winrate.run import RESULT as WINRATE
from clair.core.errors import UserError
from clair.core.files import read_json

COMPARISON = "compare.json"
Row = tuple[str, float | None, Sequence[float] | None, str]
"""The name of a measure, its share, the 95 % interval, and a remark."""


def evidence_lines(folders: Sequence[Path], model: Path, identity: str) -> list[str]:
    """Return the results in `folders` as a Markdown table, in per cent, or in points for a difference.

    `identity` is the hash of the weights in the folder `model`. Raises UserError for a folder without a result, and for
    a result of another model.
    """
    rows = [row for folder in folders for row in _rows(folder, model, identity)]
    lines = ["| | % | 95 % interval | |", "|---|---|---|---|"]
    for name, value, interval, remark in rows:
        lines.append(f"| {name} | {percent(value)} | {percent_range(interval)} | {remark} |")
    return lines


def _rows(folder: Path, model: Path, identity: str) -> Iterator[Row]:
    if (folder / SCORE).is_file():
        yield from _score_rows(folder, identity)
    elif (folder / WINRATE).is_file():
        yield _winrate_row(read_json(folder / WINRATE), folder, identity)
    elif (folder / PAIRS).is_file():
        result = read_json(folder / PAIRS)
        _check(Path(result["settings"]["model"]).resolve() == model.resolve(), folder, result["settings"]["model"])
        accuracy = result["reward_accuracy"]
        yield "held-out reward accuracy", accuracy["mean"], accuracy["ci95"], f"{result['pairs']:,} pairs"
    elif (folder / COMPARISON).is_file():
        yield from _comparison_rows(read_json(folder / COMPARISON), folder, identity)
    else:
        raise UserError(
            f"--evidence {folder} holds no result of `apo eval` or `apo compare` ({SCORE}, {WINRATE}, {PAIRS} or "
            f"{COMPARISON}); give the --out of a finished one"
        )


def _score_rows(folder: Path, identity: str) -> Iterator[Row]:
    score = read_results(folder).score
    _check(score.model.identity == identity, folder, score.model.name)
    compared = score.comparable()
    settings = f"{score.items:,} items" + (f", judge {compared['judge.model']}" if compared.get("judge.model") else "")
    for name, value in score.reported.items():
        interval = score.intervals[name].ci95  # pyright: ignore[reportArgumentType]  # the names of its intervals
        yield f"{score.benchmark}, {name.replace('_', ' ')}", value, interval, settings


def _winrate_row(result: Mapping[str, Any], folder: Path, identity: str) -> Row:
    _check(result["tuned"]["identity"] == identity, folder, result["tuned"]["name"])
    rate = result["win_rate"] or {"mean": None, "ci95": None}
    remark = f"judge {result['judge']['name']}, {result['comparisons']:,} comparisons"
    return f"win rate against {result['base']['name']}", rate["mean"], rate["ci95"], remark


def _comparison_rows(result: Mapping[str, Any], folder: Path, identity: str) -> Iterator[Row]:
    models = zip(result["tuned"], result["parts"][0]["tuned"], strict=True)
    rows = [(entry, numbers) for entry, numbers in models if entry["identity"] == identity]
    _check(bool(rows), folder, ", ".join(entry["name"] for entry in result["tuned"]))
    benchmark, base = result["compared"]["benchmark"], result["base"]["name"]
    for entry, numbers in rows:
        remark = "points" if numbers["p_holm"] is None else f"points, p {numbers['p_holm']:.3f}"
        if (best := result["best"]) and best["name"] == entry["name"]:
            remark += f", the best of {best['of']}: corrected {100 * best['corrected']:+.1f}"
        yield f"{benchmark} minus {base}", numbers["delta"], numbers["delta_ci95"], remark


def _check(same: bool, folder: Path, name: str) -> None:
    if not same:
        raise UserError(f"--evidence {folder} is of another model, {name}; give results of the model that is pushed")
