"""Pilots and the choice among them as a table and as lines, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def pilot_table(result: Mapping[str, Any]) -> Table:
    """Each pilot with its rate and that of the full run, its gain with a 95 % interval, and its held-out pairs."""
    scale = result["scale"]
    title = f"gain over the base on {result['prompts']:,} prompts: {result['meaning']}"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)
    for head in ("objective", "nats", "rate", "full rate", "gain", "95 % interval", "right, %", "stopped"):
        table.add_column(head, overflow="fold")
    table.add_row("none", "", "", "", _number(0.0, scale), "", "", "")
    for pilot in result["pilots"]:
        gain, right = pilot["gain"], pilot["right"]
        table.add_row(
            pilot["objective"],
            f"{pilot['displacement']:g}",
            f"{pilot['learning_rate']:.2g}",
            f"{pilot['full_learning_rate']:.2g}",
            _number(gain["mean"], scale) if gain else "",
            " to ".join(_number(end, scale) for end in gain["ci95"]) if gain and gain["ci95"] else "",
            f"{100 * right['mean']:.1f}" if right else "",
            pilot["stopped"] or pilot["failed"] or "",
        )
    return table


def _number(value: float, scale: float) -> str:
    return f"{scale * value + 0.0:+.1f}" if scale == 100 else f"{value + 0.0:+.3g}"


def pilot_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the choice, its reason, what these prompts cannot tell, and the cost."""
    verdict, scale = result["verdict"], result["scale"]
    if result["recommended"]:
        objective, rate = (override.partition("=")[2] for override in result["recommended"])
        yield f"objective: {objective}, learning rate {rate}, beta {result['beta']:g} (certainty: {verdict['sure']})"
    elif verdict["needed"]:
        yield f"too few prompts to recommend training (certainty: {verdict['sure']})"
    else:
        yield f"do not train on these pairs (certainty: {verdict['sure']})"
    yield f"because: {verdict['because']}"
    interval = " to ".join(_number(end, scale) for end in verdict["ci95"])
    yield (
        f"the best pilot, {verdict['best']}, gains {_number(verdict['gain'], scale)}, of which choosing the best "
        f"accounts for {scale * verdict['bias']:.2g}; corrected {_number(verdict['corrected'], scale)}, 95 % interval "
        f"{interval}"
    )
    if verdict["close"] and result["recommended"]:
        yield f"! these prompts do not tell it apart from {', '.join(verdict['close'])}"
    if result["left_out"]:
        yield f"! {result['left_out']} rows are left out: not every model has a score"
    cost = result["cost"]
    yield (
        f"cost: {cost['matching_steps']:,} steps to match rates and {cost['pilot_steps']:,} of pilots, "
        f"{cost['share']:.2g} of a full run's {cost['full_steps']:,}"
    )
    command = f"apo train {result['recipe']} {' '.join(f'--set {override}' for override in result['best_guess'])}"
    if result["recommended"]:
        yield f"train: {command}"
    elif verdict["needed"]:
        yield f"if you train anyway, the best guess is: {command}"
