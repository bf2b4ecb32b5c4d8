"""Self-contained HTML pages that open offline and in which user text can never run.

A page is assembled from files in assets/: page.css and page.js (tables, plots, diffs, lists of any length, light and
dark), and the page's own files. Its data is JSON in inert script blocks and enters the document as text nodes only. Its
content security policy allows just its own scripts and styles, by hash, forbids every request, and makes the browser
refuse text that is assigned as markup (Trusted Types).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from clair.data.contrast import split_pieces, word_diff

_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")


def json_text(value: Any) -> str:
    """JSON that is safe inside a script element and always encodes to UTF-8.

    It contains no `<`, hence no `</script` and no `<!--`. Infinite numbers and NaN become null.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any) -> Any:
    """A JSON value with null in place of infinite numbers and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def html_page(title: str, assets: Sequence[str], blocks: Mapping[str, str]) -> str:
    """A whole page: the shared assets followed by `assets` (.html, .css, .js), and `blocks` of `json_text` by id."""
    body, style, script = (
        "".join(read_asset(asset) for asset in (*shared, *assets) if asset.endswith(kind))
        for kind, shared in ((".html", ()), (".css", ("page.css",)), (".js", ("page.js",)))
    )
    assert not any("<" in text for text in blocks.values()), "a block must come from json_text"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{html.escape(title.encode('utf-8', 'replace').decode())}</title>",
            f"<style>{style}</style>",
            "</head>",
            f"<body>\n{body}",
            *(f'<script type="application/json" id="{id}">{text}</script>' for id, text in blocks.items()),
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def read_asset(file: str) -> str:
    """The text of a file in assets/."""
    return resources.files("clair.reporting").joinpath("assets", file).read_text("utf-8")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def clip(text: str, limit: int) -> str:
    """The text; if longer than `limit` characters, its beginning and end with the number of characters between."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[-tail:]}"


def diff(rejected: str, chosen: str) -> list[list[Any]]:
    """The word diff as JSON: [0, text] for shared text, [-1, text] for removed and [1, text] for added text.

    If shared words differ in white space, the item is [0, chosen's, rejected's]. So both texts can be restored exactly:
    chosen from the items 0 and 1, rejected from 0 and -1.
    """
    kinds = {"same": 0, "gone": -1, "new": 1}
    loser = split_pieces(rejected)
    segments: list[list[Any]] = []
    position = 0
    for kind, text in word_diff(rejected, chosen):
        item: list[Any] = [kinds[kind], text]
        if kind != "new":
            count = len(split_pieces(text))
            old = "".join(loser[position : position + count])
            position += count
            if old != text:
                item.append(old)
        segments.append(item)
    return segments


def histogram(values: Sequence[float], edges: Sequence[float]) -> dict[str, Any]:
    """Counts of `values` between neighbouring `edges`, with n, mean and the 5, 50 and 95 % quantiles.

    A bin includes its lower edge, the last bin both edges. Values outside are counted in the outermost bins.
    """
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    result: dict[str, Any] = {"edges": list(edges), "counts": counts, "n": len(values)}
    if values:
        ordered = sorted(values)
        result["mean"] = math.fsum(values) / len(values)
        for share in (5, 50, 95):
            result[f"q{share}"] = ordered[round((len(ordered) - 1) * share / 100)]
    return result


def round_edges(top: float) -> list[float]:
    """0, 1, 2, 5, 10, 20, 50 ... up to the first edge above `top`: bins of a count that spans magnitudes."""
    edges: list[float] = [0]
    power = 1
    while True:
        for step in (1, 2, 5):
            edges.append(step * power)
            if edges[-1] > top:
                return edges
        power *= 10
