"""What training does to the pairs: sums over pairs as it runs, means at each logging step, series afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from apo.logps import PairLogps

MEANS_OF_LOGPS = ("loss", "logps/chosen", "logps/rejected")
MEANS_OF_RATIOS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties",
    "logratios/chosen", "logratios/rejected", "chosen_falls",
)  # fmt: skip
"""Means over pairs. `rewards/accuracies` counts a tie one half; `chosen_falls` is the share of pairs whose chosen
response has become less likely than under the reference."""


def pair_sums(
    losses: Tensor,
    policy: PairLogps,
    reference: tuple[Tensor, Tensor] | None,
    beta: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Sums over the B pairs of a batch, [2 + K]: how many pairs, what they weigh, then what `MEANS_OF_LOGPS` and (with
    a reference) `MEANS_OF_RATIOS` name, in that order. Only the loss is weighted. No gradient, no transfer to the host.
    """
    weights = torch.ones_like(losses) if weights is None else weights
    columns = [weights, weights * losses, policy.chosen, policy.rejected]
    if reference is not None:
        chosen, rejected = policy.chosen - reference[0], policy.rejected - reference[1]
        ties = (chosen == rejected).to(chosen.dtype)
        columns += [
            beta * chosen, beta * rejected, beta * (chosen - rejected),
            (chosen > rejected) + ties / 2, ties, chosen, rejected, (chosen < 0).to(chosen.dtype),
        ]  # fmt: skip
    return torch.stack([column.detach().float().sum() for column in (torch.ones_like(losses), *columns)])


def means_of(sums: list[float]) -> dict[str, float]:
    """The named means that a vector of `pair_sums` (added up over batches and processes) stands for."""
    pairs, weight, loss, *totals = sums
    names = (*MEANS_OF_LOGPS, *MEANS_OF_RATIOS)[1 : len(totals) + 1]
    means = {name: total / pairs for name, total in zip(names, totals, strict=True)}
    return {"loss": loss / weight if weight else 0.0, **means}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line torn by a killed process is left out."""
    file = Path(path)
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric over training; NaN where a log holds no number."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def settled_logps(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Log-probs of `name` ("chosen" or "rejected") over training, freed from which pairs each log looked at.

    A log's mean moves with the lengths of its pairs far more than with training. Its reference log-prob, logged
    minus log-ratio, says by how much: the mean of that over all logs, plus the log-ratio, is the average pair's.
    """
    steps, logps = series(rows, f"logps/{name}")
    ratios = series(rows, f"logratios/{name}")[1]
    references = [logp - ratio for logp, ratio in zip(logps, ratios, strict=True)]
    references = [reference for reference in references if not math.isnan(reference)]
    reference = sum(references) / max(len(references), 1)
    return steps, [reference + ratio for ratio in ratios]
