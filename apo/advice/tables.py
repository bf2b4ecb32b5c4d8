"""Evidence and advice as a table and as lines, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

_LIKELIHOOD = {
    "winner_gap": "winner − own answer, nats a token",
    "winner_total": "  summed over the answer",
    "loser_gap": "loser − own answer, nats a token",
    "loser_total": "  summed over the answer",
    "pair_gap": "winner − loser, nats a token",
    "pair_total": "  summed over the answer",
}
_STEP = {
    "coherence": ("coherence of the pairs, %", 100),
    "displacement": ("winner's part in the margin's growth, %", 100),
    "winner_wrong": ("winners that fall, % of pairs", 100),
    "loser_wrong": ("losers that rise, % of pairs", 100),
}


def evidence_table(result: Mapping[str, Any], dataset: str) -> Table:
    """Return the evidence with 95 % intervals."""
    sample = result["sample"]
    title = f"{dataset}: {sample['rows']:,} of {sample['prompts']:,} prompts, {sample['pairs']:,} pairs"
    table = Table("", "value", "95 % interval", title=title)
    for name, label in (("win", "winner against own answer, wins %"), ("right", "winner against loser, wins %")):
        interval = result["evidence"][name]
        absence = "the judge is not used" if result["judge"] else "no judge"
        table.add_row(label, *(_numbers(interval, 100) if interval else ("", absence)))
    controlled = ((result["judge"] or {}).get("win") or {}).get("length_controlled") or {}
    if result["evidence"]["win"] and controlled.get("rate") is not None:
        lo, hi = controlled["ci95"]
        interval = {"value": controlled["rate"], "lo": lo, "hi": hi}
        table.add_row("  against own answer at equal lengths, %", *_numbers(interval, 100))
    table.add_section()
    for name, label in _LIKELIHOOD.items():
        table.add_row(label, *_numbers(result["likelihood"][name]))
    table.add_section()
    for name, (label, scale) in _STEP.items():
        table.add_row(f"first step: {label}", *_numbers(result["likelihood"][name], scale))
    table.add_section()
    contrast = result["contrast"]
    for name, label in (("jaccard", "Jaccard"), ("levenshtein", "Levenshtein"), ("length_ratio", "length ratio")):
        table.add_row(label, *_numbers(contrast[name]))
    table.add_row("longer winners, %", *_numbers(contrast["longer"], 100))
    return table


def advice_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the advice, its reason and each warning."""
    advice = result["advice"]
    if advice["objective"] == "none":
        yield f"do not train on these pairs (certainty: {advice['sure']})"
    else:
        rate = f"beta {advice['beta']:g}, learning rate {advice['learning_rate']:g} (LoRA: ten times that)"
        yield f"objective: {advice['objective']}, {rate} (certainty: {advice['sure']})"
    yield f"because: {advice['because']}"
    yield from (f"! {note}" for note in (*advice["beware"], *result["notes"]))


def _numbers(interval: Mapping[str, float], scale: float = 1) -> tuple[str, str]:
    value, lo, hi = (scale * interval[key] for key in ("value", "lo", "hi"))
    if scale == 100:
        return f"{value:.1f}", f"{lo:.1f} to {hi:.1f}"
    return f"{value:.3g}", f"{lo:.3g} to {hi:.3g}"
