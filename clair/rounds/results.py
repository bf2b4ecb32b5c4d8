"""The results of the rounds: one row a round, the table, the picture, and the rule that ends them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """The numbers of a round. `gain` and `score` are shares; `gain` is against the model of the round before."""

    round: int
    model: str
    pairs: int
    dropped: int
    failed: int
    cost: Mapping[str, str]
    steps: int
    gain: float
    gain_ci95: Sequence[float] | None
    """None if there are too few prompts, or no answer that differs."""
    score: float | None
    score_ci95: Sequence[float] | None
    seconds: Mapping[str, float]

    @property
    def is_gain(self) -> bool:
        """True if the interval of the gain lies above 0."""
        return self.gain_ci95 is not None and self.gain_ci95[0] > 0

    def row(self) -> dict[str, Any]:
        """The content of rounds.json."""
        return asdict(self)


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
    """Gain and score of a round, each with its interval, and the seconds of the evaluation."""
    if rounds.config.evaluate.kind == "winrate":
        result = read_json(rounds.evaluation(number) / "winrate.json")
        rate = result["win_rate"]
        interval = rate["ci95"] and [end - 0.5 for end in rate["ci95"]]
        return rate["mean"] - 0.5, interval, None, None, result["seconds"]
    overall = read_json(rounds.folder(number) / "compare" / "compare.json")["parts"][0]["tuned"][0]
    seconds = read_json(rounds.evaluation(number) / "score.json").get("seconds") or 0.0
    return overall["delta"], overall["delta_ci95"], overall["score"], overall["ci95"], seconds


def stop_reason(result: RoundResult, stop: str) -> str | None:
    """Why no further round follows, by the stop rule; None if one may."""
    if stop == "never" or result.is_gain:
        return None
    if result.gain_ci95 is None:
        return f"round {result.round} has no interval of its gain (too few prompts or no difference), so it shows none"
    return f"the gain of round {result.round}, {_points(result)} points, may be none by its interval"


def best_model(results: Sequence[RoundResult], base: str) -> str:
    """The model of the last round with a gain that its interval shows; without one the base model."""
    return next((result.model for result in reversed(results) if result.is_gain), base)


def _points(result: RoundResult) -> str:
    interval = result.gain_ci95
    ends = f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else "no interval"
    return f"{100 * result.gain:+.1f} {ends}"


def table(results: Sequence[RoundResult]) -> Table:
    """The rounds, one line each, the gains in points with 95 % intervals."""
    scored, paid = any(result.score is not None for result in results), any(result.cost for result in results)
    columns = ("round", "pairs", "dropped", "steps", "gain over the round before", "time")
    view = Table(*columns, *(["score, %"] if scored else []), *(["cost"] if paid else []))
    for result in results:
        dropped = f"{result.dropped:,}" + (f" ({result.failed:,} failed)" if result.failed else "")
        cells = [str(result.round), f"{result.pairs:,}", dropped, f"{result.steps:,}", _points(result)]
        cells += [duration(sum(result.seconds.values()))]
        cells += [f"{100 * result.score:.1f}"] if result.score is not None else []
        cells += [", ".join(f"{role} {cost}" for role, cost in result.cost.items())] if paid else []
        view.add_row(*cells)
    return view


def draw(results: Sequence[RoundResult], path: Path) -> None:
    """Plot the gain of each round with its interval, and the pairs that it was trained on."""
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
        gains.plot([result.round] * 2, [100 * end for end in interval], color=color, linewidth=1.9)
        gains.plot(result.round, 100 * result.gain, "o", color=color, markersize=5)
    gains.axhline(0, color="#6b7280", linewidth=0.8, linestyle=(0, (2, 3)))
    gains.set_title("Gain over the round before, points", loc="left", fontsize=10)
    pairs.bar(numbers, [result.pairs for result in results], color="#c8553d", width=0.5)
    pairs.set_title("Pairs", loc="left", fontsize=10)
    for axes in (gains, pairs):
        axes.set_xlim(0.4, max(numbers) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})
