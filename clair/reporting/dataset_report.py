"""The page a person looks at before training: `clair report DIR` writes one HTML file, complete in itself.

It holds the funnel from prompts to pairs, contrast and length of all pairs, tokens and cost, and the pairs
themselves to read, search, sort and mark. Numbers are of all pairs; full text is of as many as fit the page.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.data.dataset import CONTRAST, read_manifest, read_rows
from clair.data.records import message_text
from clair.pipeline.filters import FILTERS
from clair.prompting.parse import FAILURES
from clair.reporting.html_page import clip, diff, histogram, html_page, json_text, round_edges
from clair.reporting.review import FORMAT, REASON, STAGE, fingerprint
from clair.reporting.sampling import METRICS, Rows, fit, read_filters, short, stratified_order

MAX_BYTES = 25_000_000
"""A page is never larger: mail, chat and browsers take it, and it opens at once."""
FULL_TEXTS = 2_000
"""Of how many pairs a page holds the full text; of more where all are short."""
_SHORT = 5_000_000
_ROWS_BYTES = 13_000_000
_DROPS_BYTES = 3_000_000
_LEAST_CLIP, _MOST_CLIP = 24_000, 100_000
_CELLS = 24
_SPLITS = ("train", "test")
_PARTS = ("report.html", "report.css", "overview.js", "report.js")


def report(folder: str | Path, out: str | Path | None = None, filters: Sequence[str] = ()) -> Path:
    """Write the page of a dataset folder to `out` (DIR/report.html) and return where it is. Equal folders, equal bytes.

    `filters` choose whose full text it holds; of more than `FULL_TEXTS` pairs it is a sample spread evenly over
    contrast and length. Raises UserError for a folder without a finished dataset, or a filter that cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted = read_filters(filters)
    rows = Rows()
    for split in _SPLITS:
        for row in read_rows(folder, [split]):
            rows.add(row, split, wanted)
    if filters and not rows.wanted:
        raise UserError(f"no pair of {folder} fits --filter {' --filter '.join(filters)}; nothing to show")
    listed = fit(rows, _ROWS_BYTES)
    data = json_text(
        {
            "format": FORMAT,
            "name": folder.resolve().name,
            "fingerprint": fingerprint(manifest),
            "filters": list(filters),
            "overview": overview(manifest, rows),
            "metrics": METRICS,
            "rows": _columns(rows, listed),
            "drops": _drops(folder, manifest),
        }
    )
    title = f"{folder.resolve().name}: {len(rows.ids):,} pairs"
    without = html_page(title, _PARTS, {"data": data, "full": "[]", "texts": "{}"})
    texts = _texts(folder, rows, listed, MAX_BYTES - 10 * FULL_TEXTS - len(without.encode()))
    blocks = {"data": data, "full": json_text(list(texts)), "texts": "{" + ",".join(texts.values()) + "}"}
    target = Path(out) if out is not None else folder / "report.html"
    write_atomically(target, html_page(title, _PARTS, blocks))
    return target


def _columns(rows: Rows, listed: Sequence[int]) -> dict[str, Any]:
    return {
        "id": [rows.ids[i] for i in listed],
        "test": [rows.test[i] for i in listed],
        "opening": [rows.openings[i] for i in listed],
        "numbers": {name: [short(column[i]) for i in listed] for name, column in rows.numbers.items()},
    }


def _texts(folder: Path, rows: Rows, listed: Sequence[int], room: int) -> dict[int, str]:
    """The full texts that fit into `room` bytes, as JSON members by place in the list."""
    place = {i: at for at, i in enumerate(listed)}
    order = stratified_order(rows, [i for i in rows.wanted if i in place])
    characters = accumulate(rows.characters[i] for i in order)
    order = order[: max(FULL_TEXTS, sum(1 for _ in takewhile(lambda total: total <= _SHORT, characters)))]
    limit = min(_MOST_CLIP, max(_LEAST_CLIP, room // (8 * max(1, len(order)))))
    chosen, found = set(order), {}
    for i, row in enumerate(read_rows(folder, _SPLITS)):
        if i in chosen:
            found[i] = f'"{place[i]}":{json_text(full_text(row, limit))}'
    kept, used = [], 0
    for i in order:
        size = len(found[i].encode()) + 10  # a comma, and its place in the list of those with text
        if used + size <= room:
            used += size
            kept.append(i)
    return {place[i]: found[i] for i in sorted(kept)}


def full_text(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Everything to read of a pair, no text longer than about `limit` characters."""
    chosen, rejected = (clip(row[side][-1]["content"], limit) for side in ("chosen", "rejected"))
    models = row.get("models") or {}
    return {
        "prompt": [[turn["role"], clip(message_text(turn), limit)] for turn in row["prompt"]],
        "diff": diff(rejected, chosen),
        "reasoning": clip(row.get("reasoning") or "", limit),
        "models": {side: models.get(side) or "" for side in ("chosen", "rejected")},
    }


def _drops(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The rows without a pair, as many of every reason as fit, in the order of the file."""
    with open(folder / "dropped.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = sorted({f"{row['stage']}.{row['reason']}" for row in rows} | set(manifest["drop_reasons"]))
    seen: Counter[str] = Counter()
    turns = []
    for i, row in enumerate(rows):
        name = f"{row['stage']}.{row['reason']}"
        turns.append((seen[name], i))
        seen[name] += 1
    listed, used = [], 0
    for _, i in sorted(turns):
        used += len(json_text([rows[i]["id"], rows[i]["detail"]]).encode()) + 8
        if used > _DROPS_BYTES:
            break
        listed.append(i)
    shown = [rows[i] for i in sorted(listed)]
    return {
        "reasons": [{"name": name, "help": explain(name), "count": seen[name]} for name in names],
        "reason": [names.index(f"{row['stage']}.{row['reason']}") for row in shown],
        "id": [row["id"] for row in shown],
        "detail": [row["detail"] for row in shown],
        "failed": [int(row["failed"]) for row in shown],
    }


_REASONS = {
    f"{STAGE}.{REASON}": "a person marked the pair drop",
    "prompts.duplicate": "the same prompt came before",
    "target.no_answer": "the row has no answer and the recipe has no target",
    "target.truncated": "the answer ran into max_tokens",
    "stronger.truncated": "the answer ran into max_tokens",
    "target.identical_samples": "all sampled answers are the same",
    "scores.tie": "all answers have the same score",
    "scores.missing": "an answer has no score",
    "judge.tie": "the judge finds neither better",
    "judge.contradiction": "the verdict changes with the order of the answers",
}


def explain(name: str) -> str:
    """What a drop reason ("stage.reason") means, in a sentence; empty where nothing is known of it."""
    stage, _, reason = name.partition(".")
    if name in _REASONS:
        return _REASONS[name]
    if stage == "filter" and reason in FILTERS:
        return (FILTERS[reason].__doc__ or "").strip().split("\n")[0]
    return FAILURES.get(reason, "").replace("{identifier}", "the label")


def overview(manifest: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """What the first page tells: the manifest's counts, and distributions over all pairs."""
    known = ("pipeline", "counts", "drop_reasons", "failed", "models", "sampling", "tokens", "cost", "position")
    told = {name: manifest[name] for name in (*known, "seconds", "seed", "review", "recipe") if name in manifest}
    return told | {
        "made_by": {"python": manifest.get("python"), **(manifest.get("versions") or {})},
        "histograms": {name: _histogram(name, _known(rows.numbers[name])) for name in CONTRAST},
        "lengths": _lengths(rows),
    }


def _known(column: Iterable[float]) -> list[float]:
    return [value for value in column if not math.isnan(value)]


def _histogram(name: str, values: Sequence[float]) -> dict[str, Any]:
    top = max(values, default=1.0)
    if name == "length_ratio":
        edges = [0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4, max(8, math.ceil(top))]
    elif name == "levenshtein":
        edges = round_edges(top)
    else:
        edges = [i / 20 for i in range(21)]
    return histogram(values, edges)


def _lengths(rows: Rows) -> dict[str, Any]:
    """How winners and losers compare in words, and how often each combination comes, on a logarithmic grid."""
    chosen, rejected = rows.numbers["chosen_words"], rows.numbers["rejected_words"]
    more = sorted(rows.numbers["more_words"])
    if not more:
        return {}
    both = sorted([*chosen, *rejected])
    lowest = max(1.0, both[len(both) // 200])
    highest = max(2 * lowest, both[-1 - len(both) // 200])
    scale = _CELLS / math.log(highest / lowest)

    def cell(words: float) -> int:
        return min(max(int(math.log(max(words, 1) / lowest) * scale), 0), _CELLS - 1)

    grid = Counter((cell(r), cell(c)) for r, c in zip(rejected, chosen, strict=True))
    return {
        "longer": sum(m > 0 for m in more),
        "shorter": sum(m < 0 for m in more),
        "mean": {"chosen": math.fsum(chosen) / len(more), "rejected": math.fsum(rejected) / len(more)},
        "median_more": more[len(more) // 2],
        "cells": _CELLS,
        "range": [lowest, highest],
        "grid": [[x, y, count] for (x, y), count in sorted(grid.items())],
    }
