"""compare.html: the scores, the differences with their intervals, and every answer that changed, in one file.

Built of the parts that all pages share (clair/reporting/html_page.py): what it shows travels as
JSON and reaches the document as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo.evaluation.compare.compare import flip_kind, flips
from apo.evaluation.results import Item, Results
from clair.core.errors import one_line
from clair.core.files import write_atomically
from clair.reporting.html_page import clip, diff, html_page, json_text

MAX_BYTES = 20_000_000
"""Room for the changed answers of a page; where they are more, the smallest changes are left out and counted."""
_LONGEST = 20_000
_OPENING = 140
_PARTS = ("compare.html", "report.css", "compare.css", "compare.js")


def write_page(
    out: str | Path, results: Sequence[Results], comparison: Mapping[str, Any], max_bytes: int = MAX_BYTES
) -> Path:
    """Write the page of a comparison (`compare.comparison` of these results) to `out`."""
    changed = flips(results)
    changes: list[str] = []
    room = max_bytes
    for place, before, after in changed:
        text = json_text(_change(place, before, after))
        room -= len(text.encode())
        if room < 0:
            break
        changes.append(text)
    told, left_out = json_text(comparison), len(changed) - len(changes)
    data = f'{{"comparison":{told},"changes":[{",".join(changes)}],"left_out":{left_out}}}'
    title = f"{comparison['base']['name']} and {', '.join(model['name'] for model in comparison['tuned'])}"
    write_atomically(out, html_page(clip(title, 120), _PARTS, {"data": data}))
    return Path(out)


def _change(place: int, before: Item, after: Item) -> dict[str, Any]:
    both = (before, after)
    return {
        "model": place,
        "kind": flip_kind(before.score, after.score),
        "split": after.split,
        "row": after.row,
        "sample": after.sample,
        "benchmark": after.benchmark,
        "opening": one_line(after.prompt.removeprefix("Question: ")[: 4 * _OPENING], _OPENING),
        "prompt": clip(after.prompt, _LONGEST),
        "target": [clip(target, _LONGEST) for target in after.target],
        "scores": [item.score for item in both],
        "diff": diff(*(clip(item.response, _LONGEST) for item in both)),
        "judged": [clip(item.judgement, _LONGEST) for item in both],
        "truncated": [item.truncated for item in both],
        "unresolved": [item.unresolved for item in both],
    }
