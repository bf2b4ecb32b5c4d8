"""What a person sees of an evaluation in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from apo.evaluate.results import Interval, Results

_NAMES = {"overall": "overall", "free_form": "free-form", "multiple_choice": "multiple choice"}


def score_table(results: Results) -> Table:
    """The score of each split and benchmark in per cent, with its interval, and what it rests on."""
    score = results.score
    judge = score.judge.model or "rule parser"
    title = f"{score.model.name}: MixEval-{score.split.capitalize()} {score.version}, {score.profile}, judge {judge}"
    table = Table("", "score", "95 % interval", "items", "questions", "unresolved", title=escape(title))
    for part, name in _NAMES.items():
        interval, value = score.intervals[part], getattr(score, part)
        left = [i for i in results.items if i.unresolved and (part == "overall" or i.split.replace("-", "_") == part)]
        counts = (str(interval.n), str(interval.questions), str(len(left)))
        table.add_row(name, f"{100 * value:.1f}", _told(interval), *counts)
    table.add_section()
    for split, parts in score.by_benchmark.items():
        for name, part in parts.items():
            row = (f"{100 * part.score:.1f}", "", str(part.n), "", str(part.unresolved))
            table.add_row(f"{split} {escape(name)}", *row)
    return table


def _told(interval: Interval) -> str:
    return f"{100 * interval.ci95[0]:.1f} to {100 * interval.ci95[1]:.1f}" if interval.ci95 else ""


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The differences of a comparison in points: for all rows and each split, of every tuned model."""
    base = comparison["base"]["name"]
    title = f"Tuned minus {base}, points; {comparison['rows']:,} rows of {comparison['questions']:,} questions"
    heads = ("", "", "score", "difference", "95 % interval", "p", "corrected", "better", "worse")
    table = Table(*heads, title=escape(title))
    for place, model in enumerate(comparison["tuned"]):
        for part in comparison["parts"]:
            if part["level"] == "benchmark":
                continue
            one = part["tuned"][place]
            overall = part["level"] == "overall"
            table.add_row(
                escape(model["name"]) if overall else "",
                part["split"] or "overall",
                f"{100 * one['score']:.1f}",
                f"{100 * one['delta']:+.1f}",
                _points(one["delta_ci95"]) or one["no_interval"],
                *(_chance(one[p]) for p in ("p", "p_holm")),
                *(str(one[count]) for count in ("better", "worse")),
            )
        table.add_section()
    return table


def comparison_words(comparison: Mapping[str, Any]) -> Iterator[str]:
    """What beside the table has to be said: the bias of choosing the best, and what could have been seen."""
    if best := comparison["best"]:
        delta, bias, left = (f"{100 * best[key]:.1f}" for key in ("delta", "selection_bias", "corrected"))
        yield (
            f"The best of {best['of']}, {best['name']}, leads by {delta} points, of which choosing the best accounts "
            f"for about {bias}; corrected {left}, 95 % interval {_points(best['ci95'])}."
        )
    for model, power in zip(comparison["tuned"], comparison["power"], strict=True):
        if power:
            told = [f"{100 * power[key]:.1f}" for key in ("detectable", "difference")]
            yield (
                f"{model['name']}: a true difference of {told[0]} points is found 8 times of 10, one of {told[1]} "
                f"{10 * power['power']:.1f} times; to see that one takes about {power['questions_needed']:,} questions."
            )


def _points(interval: Sequence[float] | None) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}" if interval else ""


def _chance(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
