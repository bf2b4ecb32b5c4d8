"""What all our HTML pages share: one file that opens offline, in which user text can do nothing but be read.

A page is put together from files in assets/: page.css and page.js (tables, plots, diffs, a list of any length, light
and dark), and the page's own. What it shows travels as JSON in inert script blocks and reaches the document as text
nodes only. Its policy lets run just the scripts and styles it was made with, by their hashes, forbids every
request, and (Trusted Types) makes the browser refuse text that is assigned as markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from clair.data.contrast import split_pieces, word_diff

_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")


def json_text(value: Any) -> str:
    """JSON that is safe inside a script element and encodes to UTF-8 whatever the text in it: no `<` stands in it.

    Without `<` there is no `</script` and no `<!--`. Infinite numbers and NaN have no JSON and become null.
    """
    try:
        text = _dumps(value)
    except ValueError:
        text = _dumps(_finite(value))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def html_page(title: str, parts: Sequence[str], blocks: Mapping[str, str]) -> str:
    """A whole page: the templates `parts` (.html, .css, .js) behind the shared ones; `blocks` of `json_text` by id."""
    body, style, script = (
        "".join(template(part) for part in (*shared, *parts) if part.endswith(kind))
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


def template(file: str) -> str:
    """A file of clair/templates."""
    return resources.files("clair.reporting").joinpath("assets", file).read_text("utf-8")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def clip(text: str, limit: int) -> str:
    """The text, or where it is longer than `limit` characters its beginning and end and how much was left out."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[-tail:]}"


def diff(rejected: str, chosen: str) -> list[list[Any]]:
    """The word diff for a page: [0, text] what both say, [-1, text] gone, [1, text] new.

    Where both say the same words with other white space, [0, chosen's, rejected's]: both texts can be put together
    again exactly, the chosen one from the parts 0 and 1, the rejected one from 0 and -1.
    """
    kinds = {"same": 0, "gone": -1, "new": 1}
    loser = split_pieces(rejected)
    parts: list[list[Any]] = []
    at = 0
    for kind, text in word_diff(rejected, chosen):
        part: list[Any] = [kinds[kind], text]
        if kind != "new":
            count = len(split_pieces(text))
            old = "".join(loser[at : at + count])
            at += count
            if old != text:
                part.append(old)
        parts.append(part)
    return parts


def histogram(values: Sequence[float], edges: Sequence[float]) -> dict[str, Any]:
    """Counts of `values` between neighbouring `edges` (a value at an edge belongs above it, the last edge to the last
    bin, what lies outside to the outermost), with n, mean and the 5, 50 and 95 % quantiles.
    """
    from bisect import bisect_right

    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    told: dict[str, Any] = {"edges": list(edges), "counts": counts, "n": len(values)}
    if values:
        ordered = sorted(values)
        told["mean"] = math.fsum(values) / len(values)
        for share in (5, 50, 95):
            told[f"q{share}"] = ordered[round((len(ordered) - 1) * share / 100)]
    return told


def round_edges(top: float) -> list[float]:
    """0, 1, 2, 5, 10, 20, 50 ... up to the first that is above `top`: the bins of a count that spans magnitudes."""
    edges: list[float] = [0]
    power = 1
    while True:
        for step in (1, 2, 5):
            edges.append(step * power)
            if edges[-1] > top:
                return edges
        power *= 10
