"""Training metrics: numbers per pair, their aggregates at each log, and series over a run's log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from apo.losses.saturation import max_gradient_size, saturation_mask
from apo.packing.logps import PairLogps
from clair.core.errors import UserError, near_miss

if TYPE_CHECKING:
    from torch import Tensor

    from apo.losses.mixture import Mixture
    from apo.packing.batch import Stacked

COLUMNS = (
    "weight",
    "loss",
    "chosen",
    "rejected",
    "chosen_len",
    "rejected_len",
    "chosen_ref",
    "rejected_ref",
    "kl",
    "kl_per_token",
    "tokens",
    "computed",
    "useful",
    "labels",
    "products",
)
"""The numbers stored per pair until the next log: loss, log-probs, lengths, the reference, KTO's kl, token counts."""

LOGP_MEANS = ("loss", "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected")
RATIO_MEANS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/ties",
    "logratios/chosen",
    "logratios/rejected",
    "chosen_falls",
)
"""Means over pairs, or over the unpaired rows that have the response. `rewards/accuracies` counts a tie as one half;
`chosen_falls` is the share of chosen responses that are less likely than under the reference."""
ROUNDING = 1e-6
"""Maximal difference, in nats per token, of float32 log-probs of equal weights in different batches."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
"""Quantiles logged for both rewards, as in `rewards/chosen_p10`."""
SHARES = ("saturation", "padding", "shared")
CONDITIONAL_METRICS = ("rows/chosen", "rows/rejected", "kl/mismatched")
"""Logged only for unpaired rows (their counts by side), and for objectives that use KTO's kl."""


_RUNTIME = ("runtime", "samples_per_second", "steps_per_second")
"""transformers' own metrics of an evaluation."""


def check_best_metric(name: str | None, objective: Mixture, sets: Iterable[str] = ()) -> None:
    """Raise UserError if no held-out metric of this name (transformers' `metric_for_best_model`) is ever logged.

    `sets` are the names of the held-out sets if there are several: their metrics are logged as `eval_SET_loss`.
    """
    ratios = RATIO_MEANS if objective.needs_reference else ()
    points = [f"rewards/{side}_{point}" for side in ("chosen", "rejected") for point in QUANTILES if ratios]
    saturates = any(max_gradient_size(term, 1.0) is not None for _, term in objective.terms)
    never = {"saturation": not saturates, "kl/mismatched": not objective.needs_divergence}
    metrics = [*LOGP_MEANS, *ratios, *points, *SHARES, *CONDITIONAL_METRICS]
    prefixes = [f"{name}_" for name in sets] or [""]
    logged = [f"{prefix}{metric}" for prefix in prefixes for metric in metrics if not never.get(metric)]
    allowed = [*logged, *(f"{prefix}{name}" for prefix in prefixes for name in _RUNTIME)]
    if name is not None and name.removeprefix("eval_") not in allowed:
        near = near_miss(name.removeprefix("eval_"), allowed)
        raise UserError(f"metric_for_best_model: no held-out metric {name!r}{near}; logged are {', '.join(logged)}")


def per_pair_metrics(
    losses: Tensor,
    policy: PairLogps,
    reference: tuple[Tensor, Tensor] | None,
    weights: Tensor,
    kl: Iterable[Tensor | float],
    work: Tensor,
) -> Tensor:
    """Return the `COLUMNS` of a batch's B pairs, [B, C] float32, without gradient or transfer to the host.

    Without a reference, its two columns are NaN. `kl` is KTO's divergence, summed and per token; `work` is what
    `token_counts` returns.
    """
    ones = torch.ones_like(losses)
    reference = (ones * math.nan, ones * math.nan) if reference is None else reference
    columns = [weights, losses, policy.chosen, policy.rejected, policy.chosen_len, policy.rejected_len, *reference]
    columns += [ones * value for value in kl]
    return torch.cat([torch.stack([column.detach().float() for column in columns], 1), work.float()], 1)


def token_counts(stacked: Stacked) -> Tensor:
    """Count the work of each pair of a stacked batch, [B, 5]; `PackedRow.counts` is that of a packed row.

    tokens     of both sequences
    computed   by the model, padding included
    useful     computed without padding
    labels     scored by the LM head
    products   query-key products of attention, as whole rectangles (apo.cost.memory)

    In packed rows, the common prefix of a pair is computed once and nothing is padded. In TRL's batch, every sequence
    is padded to the longest. Of an unpaired row, only the sequence with a response is computed.
    """
    trained = stacked["completion_mask"].sum(1).view(2, -1)
    has = (trained > 0).long()
    tokens = stacked["attention_mask"].sum(1).view(2, -1) * has
    rows = [tokens, stacked["input_ids"].shape[1] * has, tokens, trained, tokens**2]
    return torch.stack([row.sum(0) for row in rows], 1)


def aggregate_metrics(rows: Tensor, objective: Mixture, beta: float) -> dict[str, float]:
    """Return the logged means, quantiles and shares of N pairs, from their `COLUMNS` [N, C] on the host, in float64.

    For unpaired rows, the margin is the difference of the two mean rewards.
    """
    stored = dict(zip(COLUMNS, rows.double().unbind(1), strict=True))
    policy = PairLogps(stored["chosen"], stored["rejected"], stored["chosen_len"], stored["rejected_len"])
    weight = stored["weight"].sum()
    has = {"chosen": policy.chosen_len > 0, "rejected": policy.rejected_len > 0}
    columns = {
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        "lengths/chosen": policy.chosen_len,
        "lengths/rejected": policy.rejected_len,
    }
    quantiles, reference = {}, None
    if objective.needs_reference:
        reference = stored["chosen_ref"], stored["rejected_ref"]
        chosen, rejected = policy.chosen - reference[0], policy.rejected - reference[1]
        noise = ROUNDING * policy.chosen_len, ROUNDING * policy.rejected_len
        ties = ((chosen - rejected).abs() <= noise[0] + noise[1]).double()
        better = (chosen > rejected) * (1 - ties)
        columns |= {
            "rewards/chosen": beta * chosen,
            "rewards/rejected": beta * rejected,
            "rewards/margins": beta * (chosen - rejected),
            "rewards/accuracies": better + ties / 2,
            "rewards/ties": ties,
            "logratios/chosen": chosen,
            "logratios/rejected": rejected,
            "chosen_falls": (chosen < -noise[0]).double(),
        }
    columns = {name: values[_rows_with(name, has)] for name, values in columns.items()}
    for name in ("rewards/chosen", "rewards/rejected"):
        rewards = columns.get(name)
        if rewards is not None and len(rewards):
            levels = np.quantile(rewards.numpy(), list(QUANTILES.values())).tolist()
            quantiles |= {f"{name}_{level}": value for level, value in zip(QUANTILES, levels, strict=True)}
    mask = saturation_mask(objective, policy, reference, beta=beta, kl=(stored["kl"], stored["kl_per_token"]))
    columns |= {"saturation": mask.double()} if mask is not None else {}
    shares = {
        "padding": 1 - stored["useful"].sum() / stored["computed"].sum(),
        "shared": 1 - stored["useful"].sum() / stored["tokens"].sum(),
    }
    loss = (stored["weight"] * stored["loss"]).sum() / weight if weight else weight
    columns |= {"kl/mismatched": stored["kl"]} if objective.needs_divergence else {}
    means = {name: values.mean() for name, values in columns.items() if len(values)} | shares
    if not (has["chosen"] & has["rejected"]).any():
        means |= {f"rows/{side}": present.sum() for side, present in has.items()}
        if {"rewards/chosen", "rewards/rejected"} <= set(means):
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return {"loss": loss.item(), **{name: value.item() for name, value in means.items()}, **quantiles}


def _rows_with(name: str, has: Mapping[str, Tensor]) -> Tensor:
    """Return which rows a metric covers, [N] bool: those with the response that it names, or else with both."""
    side = next((side for side in has if side in name), None)
    return has[side] if side else has["chosen"] & has["rejected"]


def series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric over training, with NaN where a log holds no number."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def adjusted_logps(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and log-probs of `name` ("chosen" or "rejected") over training, adjusted to the average pair.

    The mean of a log depends on the lengths of its pairs far more than on training, and so does its reference log-prob
    (log-prob minus log-ratio). The result is the log-ratio plus the mean reference log-prob of all logs.
    """
    steps, logps = series(rows, f"logps/{name}")
    ratios = series(rows, f"logratios/{name}")[1]
    references = [logp - ratio for logp, ratio in zip(logps, ratios, strict=True) if not math.isnan(logp - ratio)]
    reference = sum(references) / max(len(references), 1)
    return steps, [reference + ratio for ratio in ratios]
