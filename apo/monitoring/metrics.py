"""What training does to the pairs: some numbers of each pair as it runs, means at each log, series afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from apo.losses.saturation import saturation_mask
from apo.packing.logps import PairLogps
from clair.core.errors import UserError, near_miss

if TYPE_CHECKING:
    from torch import Tensor

    from apo.losses.mixture import Mixture
    from apo.packing.logps import Batch

COLUMNS = (
    "weight", "loss", "chosen", "rejected", "chosen_len", "rejected_len",
    "chosen_ref", "rejected_ref", "kl", "kl_per_token",
    "tokens", "computed", "useful", "labels", "products",
)  # fmt: skip
"""What is kept of a pair until the next log: loss, log-probs and lengths, what it is compared with, what it cost."""

MEANS_OF_LOGPS = ("loss", "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected")
MEANS_OF_RATIOS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties",
    "logratios/chosen", "logratios/rejected", "chosen_falls",
)  # fmt: skip
"""Means over pairs, of unpaired rows over those that have the response. `rewards/accuracies` counts a tie one half;
`chosen_falls` is the share of chosen responses that have become less likely than under the reference."""
ROUNDING = 1e-6
"""Nats a token by which float32 log-probs of equal weights differ at most where other pairs stand beside them."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
"""Logged of both rewards, as `rewards/chosen_p10` and so on."""
SHARES = ("saturation", "padding", "shared")
OF_SOME = ("rows/chosen", "rows/rejected", "kl/mismatched")
"""Logged of unpaired rows, desirable and undesirable, and under objectives that ask for KTO's kl."""


def check_best_metric(name: str | None, objective: Mixture) -> None:
    """Raises UserError where a held-out metric of this name (transformers' `metric_for_best_model`) is never logged."""
    ratios = MEANS_OF_RATIOS if objective.needs_reference else ()
    points = [f"rewards/{side}_{point}" for side in ("chosen", "rejected") for point in QUANTILES if ratios]
    known = [*MEANS_OF_LOGPS, *ratios, *points, *SHARES, *OF_SOME, "runtime", "samples_per_second", "steps_per_second"]
    if name is not None and not name.removeprefix("eval_").endswith(tuple(known)):  # `eval_SET_loss` of one of several
        near = near_miss(name.removeprefix("eval_"), known)
        raise UserError(f"metric_for_best_model: no held-out metric {name!r}{near}; logged are {', '.join(known[:-3])}")


def per_pair_metrics(
    losses: Tensor,
    policy: PairLogps,
    reference: tuple[Tensor, Tensor] | None,
    weights: Tensor,
    kl: Iterable[Tensor | float],
    work: Tensor,
) -> Tensor:
    """The `COLUMNS` of the B pairs of a batch, [B, C] float32; without a reference its two are NaN, and nothing reads
    them. `kl` is KTO's, summed and per token; `work` is `token_counts` the batch. No gradient, no transfer to the host.
    """
    ones = torch.ones_like(losses)
    reference = (ones * math.nan, ones * math.nan) if reference is None else reference
    columns = [weights, losses, policy.chosen, policy.rejected, policy.chosen_len, policy.rejected_len, *reference]
    columns += [ones * value for value in kl]
    return torch.cat([torch.stack([column.detach().float() for column in columns], 1), work.float()], 1)


def token_counts(batch: Batch, *, packed: bool) -> Tensor:
    """What the pairs of a stacked batch cost, [B, 5], from its masks and ids alone: no transfer to the host.

    `tokens` of both sequences; `computed` by the model, padding included; `useful`, those without padding; `labels`
    scored by the LM head; query-key `products` of attention, as whole rectangles (fit.py). In packed rows the common
    prefix of a pair is computed once and nothing is padded; in TRL's batch every sequence is as long as the longest.
    Of an unpaired row only the sequence with a response is run.
    """
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    pairs, longest = len(ids) // 2, ids.shape[1]
    chosen, rejected = batch["completion_mask"].sum(1).view(2, pairs)
    has = [(length > 0).long() for length in (chosen, rejected)]
    first, second = (length * there for length, there in zip(attended.sum(1).view(2, pairs), has, strict=True))
    if not packed:
        computed = longest * (has[0] + has[1])
        return torch.stack([first + second, computed, first + second, chosen + rejected, first**2 + second**2], 1)
    trained = batch["completion_mask"]
    same = (ids[:pairs] == ids[pairs:]) & attended[:pairs] & attended[pairs:] & (trained[:pairs] == trained[pairs:])
    common = same.long().cumprod(1).sum(1) * has[0] * has[1]
    rest = second - common
    scored = chosen + (trained[pairs:] * (torch.arange(longest, device=ids.device) >= common[:, None])).sum(1)
    return torch.stack([first + second, first + rest, first + rest, scored, first**2 + rest * second], 1)


def measure(rows: Tensor, objective: Mixture, beta: float) -> dict[str, float]:
    """The named means, quantiles and shares of N pairs, from their `COLUMNS` [N, C] on the host, in float64.

    The margin of unpaired rows is that of the two mean rewards.
    """
    of = dict(zip(COLUMNS, rows.double().unbind(1), strict=True))
    policy = PairLogps(of["chosen"], of["rejected"], of["chosen_len"], of["rejected_len"])
    weight = of["weight"].sum()
    has = {"chosen": policy.chosen_len > 0, "rejected": policy.rejected_len > 0}
    columns = {
        "logps/chosen": policy.chosen, "logps/rejected": policy.rejected,
        "lengths/chosen": policy.chosen_len, "lengths/rejected": policy.rejected_len,
    }  # fmt: skip
    quantiles, reference = {}, None
    if objective.needs_reference:
        reference = of["chosen_ref"], of["rejected_ref"]
        chosen, rejected = policy.chosen - reference[0], policy.rejected - reference[1]
        noise = ROUNDING * policy.chosen_len, ROUNDING * policy.rejected_len
        ties = ((chosen - rejected).abs() <= noise[0] + noise[1]).double()
        better = (chosen > rejected) * (1 - ties)
        columns |= {
            "rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected,
            "rewards/margins": beta * (chosen - rejected), "rewards/accuracies": better + ties / 2,
            "rewards/ties": ties, "logratios/chosen": chosen, "logratios/rejected": rejected,
            "chosen_falls": (chosen < -noise[0]).double(),
        }  # fmt: skip
    columns = {name: column[_rows_with(name, has)] for name, column in columns.items()}
    for name in ("rewards/chosen", "rewards/rejected"):
        if len(column := columns.get(name, ())):
            found = np.quantile(column.numpy(), list(QUANTILES.values())).tolist()
            quantiles |= {f"{name}_{word}": value for word, value in zip(QUANTILES, found, strict=True)}
    full = saturation_mask(objective, policy, reference, beta=beta, kl=(of["kl"], of["kl_per_token"]))
    columns |= {"saturation": full.double()} if full is not None else {}
    shares = {
        "padding": 1 - of["useful"].sum() / of["computed"].sum(),
        "shared": 1 - of["useful"].sum() / of["tokens"].sum(),
    }
    loss = (of["weight"] * of["loss"]).sum() / weight if weight else weight
    columns |= {"kl/mismatched": of["kl"]} if objective.needs_divergence else {}
    means = {name: column.mean() for name, column in columns.items() if len(column)} | shares
    if not (has["chosen"] & has["rejected"]).any():
        means |= {f"rows/{side}": there.sum() for side, there in has.items()}
        if {"rewards/chosen", "rewards/rejected"} <= set(means):
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return {"loss": loss.item(), **{name: value.item() for name, value in means.items()}, **quantiles}


def _rows_with(name: str, has: Mapping[str, Tensor]) -> Tensor:
    """Which rows a metric is about: those with the response it names, for margins and the like those with both."""
    side = next((side for side in has if side in name), None)
    return has[side] if side else has["chosen"] & has["rejected"]


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
