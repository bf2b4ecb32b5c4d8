"""The held-out pairs after training: the log-ratios of each, from which `apo sweep` picks a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from apo.monitoring.prediction import right_order
from clair.core.files import content_hash


def held_out_rows(pairs: Iterable[Any], logratios: Iterable[Sequence[float]]) -> list[dict[str, Any]]:
    """The rows of held_out.jsonl: `right` is 1 if the chosen answer has the larger reward, and 1/2 for a tie.

    `logratios` is what `APOTrainer.held_out_logratios` returns of the `pairs`.
    """
    rows = []
    for index, (pair, (chosen, rejected, rounding, _)) in enumerate(zip(pairs, logratios, strict=True)):
        prompt = content_hash(list(pair["prompt_ids"]))[:16]
        row = {"id": str(pair.get("id", index)), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append({**row, "right": right_order(chosen, rejected, rounding)})
    return rows
