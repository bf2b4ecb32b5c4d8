"""compare.html: scores, differences with their intervals, and every changed answer, in one self-contained file.

It consists of the parts that all pages share (clair/reporting/html_page.py). Its data is embedded as JSON, and the
script inserts it into the document as text only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo.evaluation.compare.changes import change_kind, changed_answers
from apo.evaluation.results import AnyItem, Results
from clair.core.errors import one_line
from clair.core.files import write_atomically
from clair.reporting.html_page import clip, diff, html_page, json_text

MAX_BYTES = 20_000_000
"""Bytes for the changed answers of a page. If they need more, the smallest changes are left out and counted."""
_MAX_TEXT = 20_000
_MAX_OPENING = 140
_ASSETS = ("compare.html", "report.css", "compare.css", "compare.js")


def write_page(
    out: str | Path, results: Sequence[Results], comparison: Mapping[str, Any], max_bytes: int = MAX_BYTES
) -> Path:
    """Write the page of a comparison (`compare.comparison` of these results) to `out`."""
    changed = changed_answers(results)
    changes: list[str] = []
    for index, base, tuned in changed:
        text = json_text(_change(index, base, tuned))
        max_bytes -= len(text.encode())
        if max_bytes < 0:
            break
        changes.append(text)
    comparison_text, left_out = json_text(comparison), len(changed) - len(changes)
    data = f'{{"comparison":{comparison_text},"changes":[{",".join(changes)}],"left_out":{left_out}}}'
    title = f"{comparison['base']['name']} and {', '.join(model['name'] for model in comparison['tuned'])}"
    write_atomically(out, html_page(clip(title, 120), _ASSETS, {"data": data}))
    return Path(out)


def _change(index: int, base: AnyItem, tuned: AnyItem) -> dict[str, Any]:
    both = (base, tuned)
    return {
        "model": index,
        "kind": change_kind(base.score, tuned.score),
        "split": tuned.split,
        "row": tuned.row,
        "sample": tuned.sample,
        "benchmark": tuned.benchmark,
        "opening": one_line(tuned.prompt.removeprefix("Question: ")[: 4 * _MAX_OPENING], _MAX_OPENING),
        "prompt": clip(tuned.prompt, _MAX_TEXT),
        "target": [clip(target, _MAX_TEXT) for target in tuned.target],
        "scores": [item.score for item in both],
        "diff": diff(*(clip(item.response, _MAX_TEXT) for item in both)),
        "judged": [clip(item.judgement, _MAX_TEXT) for item in both],
        "truncated": [item.truncated for item in both],
        "unresolved": [item.unresolved for item in both],
    }
