"""The HTML report of a dataset: `clair report DIR` writes one self-contained file to read before training.

It holds the funnel from prompts to pairs, contrast and length of all pairs, tokens and cost, and the pairs themselves
to read, search, sort and mark. The numbers are of all pairs; the full texts are of as many pairs as fit the page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.data.dataset import CONTRAST, SPLITS, read_dropped, read_manifest, read_rows
from clair.data.dataset_card import balance_text, scores_texts
from clair.data.records import message_text
from clair.pipeline.filters import FILTERS
from clair.prompting.calls import with_calls
from clair.prompting.parse import FAILURES
from clair.reporting.html_page import clip, diff, histogram, html_page, json_text, round_edges
from clair.reporting.review import FORMAT, REASON, STAGE, fingerprint
from clair.reporting.sampling import METRICS, PairColumns, compact_number, fit_to_page, read_filters, stratified_order

MAX_BYTES = 25_000_000
"""The maximum size of a page: mail and chat accept it, and browsers open it at once."""
FULL_TEXTS = 2_000
"""The number of pairs with full text on a page; larger if all are short."""
_SHORT = 5_000_000
_ROWS_BYTES = 13_000_000
_DROPS_BYTES = 3_000_000
_MIN_CLIP, _MAX_CLIP = 24_000, 100_000
_CELLS = 24
_ASSETS = ("report.html", "report.css", "overview.js", "report.js")


def report(folder: str | Path, out: str | Path | None = None, filters: Sequence[str] = ()) -> Path:
    """Write the page of a dataset folder to `out` (default DIR/report.html) and return its path. It is deterministic.

    `filters` choose the pairs with full text; of more than `FULL_TEXTS` pairs a sample spread evenly over contrast and
    length has it. Raises UserError for a folder without a finished dataset, or a filter that cannot be parsed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    is_match = read_filters(filters)
    rows = PairColumns()
    for split in SPLITS:
        for row in read_rows(folder, [split]):
            rows.add(row, split, is_match)
    if filters and not rows.matching:
        raise UserError(f"no pair of {folder} fits --filter {' --filter '.join(filters)}; nothing to show")
    listed = fit_to_page(rows, _ROWS_BYTES)
    data = json_text(
        {
            "format": FORMAT,
            "name": folder.resolve().name,
            "fingerprint": fingerprint(manifest),
            "filters": list(filters),
            "overview": overview(manifest, rows),
            "metrics": METRICS,
            "rows": {
                "id": [rows.ids[i] for i in listed],
                "test": [rows.test[i] for i in listed],
                "opening": [rows.openings[i] for i in listed],
                "numbers": {name: [compact_number(column[i]) for i in listed] for name, column in rows.numbers.items()},
            },
            "drops": _drops(folder, manifest),
        }
    )
    title = f"{folder.resolve().name}: {len(rows.ids):,} pairs"
    page_without_texts = html_page(title, _ASSETS, {"data": data, "full": "[]", "texts": "{}"})
    texts = _texts(folder, rows, listed, MAX_BYTES - 10 * FULL_TEXTS - len(page_without_texts.encode()))
    blocks = {"data": data, "full": json_text(list(texts)), "texts": "{" + ",".join(texts.values()) + "}"}
    target = Path(out) if out is not None else folder / "report.html"
    write_atomically(target, html_page(title, _ASSETS, blocks))
    return target


def _texts(folder: Path, rows: PairColumns, listed: Sequence[int], free_bytes: int) -> dict[int, str]:
    """The full texts that fit into `free_bytes`, as JSON members by index in the page's list of pairs."""
    list_index = {i: index for index, i in enumerate(listed)}
    order = stratified_order(rows, [i for i in rows.matching if i in list_index])
    characters = accumulate(rows.characters[i] for i in order)
    order = order[: max(FULL_TEXTS, sum(1 for _ in takewhile(lambda total: total <= _SHORT, characters)))]
    limit = min(_MAX_CLIP, max(_MIN_CLIP, free_bytes // (8 * max(1, len(order)))))
    chosen, members = set(order), {}
    for i, row in enumerate(read_rows(folder)):
        if i in chosen:
            members[i] = f'"{list_index[i]}":{json_text(full_text(row, limit))}'
    fitting, used_bytes = [], 0
    for i in order:
        size = len(members[i].encode()) + 10  # with a comma, and the index in the list of pairs with text
        if used_bytes + size <= free_bytes:
            used_bytes += size
            fitting.append(i)
    return {list_index[i]: members[i] for i in sorted(fitting)}


def full_text(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The texts of a pair, each clipped to about `limit` characters, with the diff from rejected to chosen."""
    turns = (row[side][-1] for side in ("chosen", "rejected"))
    chosen, rejected = (clip(with_calls(turn["content"] or "", turn.get("tool_calls") or ()), limit) for turn in turns)
    models = row.get("models") or {}
    return {
        "prompt": [[turn["role"], clip(message_text(turn), limit)] for turn in row["prompt"]],
        "diff": diff(rejected, chosen),
        "reasoning": clip(row.get("reasoning") or "", limit),
        "models": {side: models.get(side) or "" for side in ("chosen", "rejected")},
    }


def _drops(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The dropped rows in the order of the file; if not all fit, about equally many of each reason."""
    rows = list(read_dropped(folder))
    row_names = [f"{row['stage']}.{row['reason']}" for row in rows]
    names = sorted({*row_names, *manifest["drop_reasons"]})
    counts: Counter[str] = Counter()
    ranked = []
    for i, name in enumerate(row_names):
        ranked.append((counts[name], i))
        counts[name] += 1
    listed, used_bytes = [], 0
    for _, i in sorted(ranked):
        used_bytes += len(json_text([rows[i]["id"], rows[i]["detail"]]).encode()) + 8
        if used_bytes > _DROPS_BYTES:
            break
        listed.append(i)
    listed.sort()
    return {
        "reasons": [{"name": name, "help": explain(name), "count": counts[name]} for name in names],
        "reason": [names.index(row_names[i]) for i in listed],
        "id": [rows[i]["id"] for i in listed],
        "detail": [rows[i]["detail"] for i in listed],
        "failed": [int(rows[i]["failed"]) for i in listed],
    }


_REASONS = {
    f"{STAGE}.{REASON}": "a person marked the pair drop",
    "prompts.duplicate": "the same prompt came before",
    "target.no_answer": "the row has no answer and the recipe has no target",
    "weaker.no_answer": "the row has no answer and the recipe has no weaker model",
    "target.truncated": "the answer ran into max_tokens",
    "stronger.truncated": "the answer ran into max_tokens",
    "weaker.truncated": "the answer ran into max_tokens",
    "balance.length_gap": "the answers differ by more tokens than the recipe's balance allows",
    "balance.longer_winner": "the winner is longer, and winners would be longer on average",
    "target.identical_samples": "all sampled answers are the same",
    "scores.tie": "all answers have the same score",
    "scores.missing": "an answer has no score",
    "scores.flat": "the scores of all answers are nearly the same",
    "scores.floor": "no answer has the score that a winner needs",
    "scores.margin": "no two answers differ by a score within the margin",
    "checker.timeout": "the checker gave no line in time",
    "checker.crashed": "the checker ended before its line",
    "checker.unreadable": "the checker's line has another form, or is of another prompt",
    "checker.nan": "the checker gave a score that is no finite number",
    "reward.nan": "the reward model gave a score that is no finite number",
    "reward.too_long": "prompt and answer are longer than the reward model reads",
    "judge.tie": "the judge finds neither better",
    "judge.contradiction": "the verdict changes with the order of the answers",
}


def explain(name: str) -> str:
    """One sentence on a drop reason ("stage.reason"); empty for an unknown reason."""
    stage, _, reason = name.partition(".")
    if name in _REASONS:
        return _REASONS[name]
    if stage == "filter" and reason in FILTERS:
        return (FILTERS[reason].__doc__ or "").strip().split("\n")[0]
    return FAILURES.get(reason, "").replace("{identifier}", "the label")


def overview(manifest: Mapping[str, Any], rows: PairColumns) -> dict[str, Any]:
    """The data of the overview: the manifest's counts, and distributions over all pairs."""
    names = ("pipeline", "counts", "drop_reasons", "failed", "models", "sampling", "tokens", "cost", "position")
    balance = manifest.get("balance")
    result = {name: manifest[name] for name in (*names, "seconds", "seed", "review", "recipe") if name in manifest}
    return result | {
        "made_by": {"python": manifest.get("python"), **(manifest.get("versions") or {})},
        "histograms": {
            name: _histogram(name, [value for value in rows.numbers[name] if not math.isnan(value)])
            for name in CONTRAST
        },
        "scores": scores_texts(manifest),
        "lengths": _lengths(rows) | ({"balance": balance_text(balance)} if balance else {}),
    }


def _histogram(name: str, values: Sequence[float]) -> dict[str, Any]:
    top = max(values, default=1.0)
    if name == "length_ratio":
        edges = [0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4, max(8, math.ceil(top))]
    elif name == "levenshtein":
        edges = round_edges(top)
    else:
        edges = [i / 20 for i in range(21)]
    return histogram(values, edges)


def _lengths(rows: PairColumns) -> dict[str, Any]:
    """Lengths in words of chosen and rejected answers, and a 2D histogram of them with logarithmic bins."""
    chosen, rejected = rows.numbers["chosen_words"], rows.numbers["rejected_words"]
    more = sorted(rows.numbers["more_words"])
    if not more:
        return {}
    both = sorted([*chosen, *rejected])
    lowest = max(1.0, both[len(both) // 200])
    highest = max(2 * lowest, both[-1 - len(both) // 200])
    scale = _CELLS / math.log(highest / lowest)

    def cell(count: float) -> int:
        return min(max(int(math.log(max(count, 1) / lowest) * scale), 0), _CELLS - 1)

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
