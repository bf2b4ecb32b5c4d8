"""The results of the rounds: numbers, table, plot, and the stop rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.table import Table

from clair.core.files import read_json
from clair.core.progress import duration
from clair.data.dataset import read_manifest
from clair.rounds.phases import Rounds

PICTURE = "rounds.png"


@dataclass(frozen=True, slots=True)
class RoundResult:
    """The numbers of a round, as shares. `gain` is the difference from the model of the previous round."""

    round: int
    model: str
    pairs: int
    dropped: int
    failed: int
    cost: Mapping[str, str]
    steps: int
    gain: float
    gain_ci95: Sequence[float] | None
    """None if there are too few prompts, or if no answers differ."""
    score: float | None
    score_ci95: Sequence[float] | None
    seconds: Mapping[str, float]

    @property
    def is_gain(self) -> bool:
        """True if the gain counts: its interval lies above 0."""
        return self.gain_ci95 is not None and self.gain_ci95[0] > 0


def read_round(rounds: Rounds, number: int) -> RoundResult:
    """Read the results of a finished round."""
    folder = rounds.folder(number)
    manifest, run = read_manifest(folder / "pairs"), read_json(folder / "model" / "run.json")
    gain, interval, score, score_interval, seconds = _evaluated(rounds, number)
    return RoundResult(
        round=number,
        model=rounds.model(number),
        pairs=manifest["counts"]["pairs"],
        dropped=manifest["counts"]["dropped"],
        failed=manifest["failed"],
        cost=manifest.get("cost", {}),
        steps=run["steps"],
        gain=gain,
        gain_ci95=interval,
        score=score,
        score_ci95=score_interval,
        seconds={"build": manifest["seconds"], "train": run["seconds"], "evaluate": seconds},
    )


def _evaluated(rounds: Rounds, number: int) -> tuple[float, Any, float | None, Any, float]:
    """Return gain and score of a round, each with its interval, and the seconds of the evaluation."""
    if rounds.config.evaluate.kind == "winrate":
        result = read_json(rounds.evaluation(number) / "winrate.json")
        rate = result["win_rate"]
        interval = rate["ci95"] and [limit - 0.5 for limit in rate["ci95"]]
        return rate["mean"] - 0.5, interval, None, None, result["seconds"]
    overall = read_json(rounds.folder(number) / "compare" / "compare.json")["parts"][0]["tuned"][0]
    seconds = read_json(rounds.evaluation(number) / "score.json").get("seconds") or 0.0
    return overall["delta"], overall["delta_ci95"], overall["score"], overall["ci95"], seconds


def stop_reason(result: RoundResult, stop: str) -> str | None:
    """Return why no further round follows, or None if the stop rule allows one."""
    if stop == "never" or result.is_gain:
        return None
    if result.gain_ci95 is None:
        return (
            f"the gain of round {result.round} does not count: it has no interval (too few prompts, or no difference)"
        )
    return f"the gain of round {result.round}, {_points(result)} points, does not count: its interval is not above 0"


def best_model(results: Sequence[RoundResult], base: str) -> str:
    """Return the model with the highest sum of gains so far, of the rounds whose gain counts; else the base model.

    Each gain is over the previous round: with `stop: never` a round may regain less than the one before it lost.
    """
    totals = accumulate(result.gain for result in results)
    candidates = [(total, result.model) for total, result in zip(totals, results, strict=True) if result.is_gain]
    total, model = max(candidates, key=lambda candidate: candidate[0], default=(0.0, base))
    return model if total > 0 else base


def _points(result: RoundResult) -> str:
    interval = result.gain_ci95
    limits = f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else "no interval"
    return f"{100 * result.gain:+.1f} {limits}"


def rounds_table(results: Sequence[RoundResult]) -> Table:
    """Return a table with a line per round. Gains are in points with 95 % intervals."""
    scored, paid = any(result.score is not None for result in results), any(result.cost for result in results)
    columns = ("round", "pairs", "dropped", "steps", "gain over the previous round", "time")
    view = Table(*columns, *(["score, %"] if scored else []), *(["cost"] if paid else []))
    for result in results:
        dropped = f"{result.dropped:,}" + (f" ({result.failed:,} failed)" if result.failed else "")
        cells = [str(result.round), f"{result.pairs:,}", dropped, f"{result.steps:,}", _points(result)]
        cells += [duration(sum(result.seconds.values()))]
        cells += [f"{100 * result.score:.1f}"] if result.score is not None else []
        cells += [", ".join(f"{role} {cost}" for role, cost in result.cost.items())] if paid else []
        view.add_row(*cells)
    return view


def draw_rounds(results: Sequence[RoundResult], path: Path) -> None:
    """Plot the gain of each round with its interval, and the number of pairs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.6, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    gains, pairs = figure.subplots(1, 2)
    numbers = [result.round for result in results]
    for result in results:
        interval = result.gain_ci95 or (result.gain, result.gain)
        color = "#1b7f79" if result.is_gain else "#6b7280"
        gains.plot([result.round] * 2, [100 * limit for limit in interval], color=color, linewidth=1.9)
        gains.plot(result.round, 100 * result.gain, "o", color=color, markersize=5)
    gains.axhline(0, color="#6b7280", linewidth=0.8, linestyle=(0, (2, 3)))
    gains.set_title("Gain over the previous round, points", loc="left", fontsize=10)
    pairs.bar(numbers, [result.pairs for result in results], color="#c8553d", width=0.5)
    pairs.set_title("Pairs", loc="left", fontsize=10)
    for axes in (gains, pairs):
        axes.set_xlim(0.4, max(numbers) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})
