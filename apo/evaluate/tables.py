"""What a person sees of an evaluation in a terminal."""

from __future__ import annotations

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
