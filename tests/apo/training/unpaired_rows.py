"""Rows with one response and a label each."""

from __future__ import annotations

from tests.apo.conftest import make_pairs


def make_rows(n=24, seed=0, label=lambda i: i % 3 != 1):
    """Rows with one response each, two thirds of them desirable."""
    rows = []
    for i, pair in enumerate(make_pairs(n, seed)):
        answer = pair["chosen"] if label(i) else pair["rejected"]
        rows.append({"prompt": pair["prompt"], "completion": answer, "label": label(i), "id": pair["id"]})
    return rows
