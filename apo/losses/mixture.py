"""What a recipe's `objective` says: one objective, one with options, or a weighted sum of several.

    objective: apo_zero
    objective: {dpo: {label_smoothing: 0.1}}
    objective: {apo_zero: 1.0, sft: 0.1}
    objective: {apo_zero: {weight: 1.0, length_normalised: true}, sft: 0.1}

A number is a weight. Options are the parameters of the objective's function that have a number for default, besides
those that it is offered (beta, kl, lengths), and two more: `weight`, and for log-ratios `length_normalised`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from apo.losses.objectives import Objective, objective_of
from clair.core.errors import UserError, near_miss

if TYPE_CHECKING:
    from torch import Tensor

    from apo.packing.logps import PairLogps

Spec = str | Callable[..., Any] | Mapping[Any, Any] | Objective


@dataclass(frozen=True)
class Mixture:
    """Objectives with their weights; a single one has weight 1."""

    terms: tuple[tuple[float, Objective], ...]
    plain: str | dict[str, Any]
    """The same in plain values, functions by their names."""

    @property
    def name(self) -> str:
        """In one line, for cards and pictures: `apo_zero + 0.1 sft`."""
        return title_of(self.plain)

    @property
    def needs_reference(self) -> bool:
        """Whether any term does."""
        return any(term.needs_reference for _, term in self.terms)

    @property
    def needs_divergence(self) -> bool:
        """Whether any term asks for KTO's kl, which needs responses that no dataset holds."""
        return any("kl" in term.asks_for for _, term in self.terms)

    @property
    def needs_pairs(self) -> str | None:
        """Why rows with a single response cannot be trained with this, or None.

        Unpaired objectives read one response at a time, and `sft` beside them the desirable ones.
        """
        if stranger := next((t.name for _, t in self.terms if t.kind != "unpaired" and t.name != "sft"), None):
            return f"{stranger} needs pairs"
        return None if any(term.kind == "unpaired" for _, term in self.terms) else "sft alone would read no label"

    @property
    def class_weights(self) -> tuple[float, float]:
        """What a desirable and an undesirable row weigh under all unpaired terms."""
        terms = [(w, getattr(t.function, "keywords", {})) for w, t in self.terms if t.kind == "unpaired"]
        names = ("desirable_weight", "undesirable_weight")
        return tuple(sum(weight * options.get(name, 1.0) for weight, options in terms) for name in names)

    def losses(
        self, policy: PairLogps, reference: tuple[Tensor, Tensor] | None, *, beta: float, kl: Any = (0.0, 0.0)
    ) -> Tensor:
        """One loss per pair, [B]. `reference` is log-probs [B] of chosen and rejected; `kl` is (summed, per token).

        An unpaired row is a pair whose other response has no tokens.
        """
        parts = [weight * _losses(term, policy, reference, beta, kl) for weight, term in self.terms]
        return functools.reduce(torch.add, parts)


def _losses(
    term: Objective, policy: PairLogps, reference: tuple[Tensor, Tensor] | None, beta: float, kl: Any
) -> Tensor:
    lengths = {"chosen_len": policy.chosen_len, "rejected_len": policy.rejected_len}
    if term.kind == "likelihood":
        return term(policy.chosen, policy.rejected, beta=beta, **lengths)
    assert reference is not None
    chosen, rejected = policy.chosen - reference[0], policy.rejected - reference[1]
    if term.length_normalised:
        chosen, rejected = chosen / policy.chosen_len.clamp(min=1), rejected / policy.rejected_len.clamp(min=1)
    if term.kind == "paired":
        return term(chosen, rejected, beta=beta, **lengths)
    desirable = torch.arange(2 * len(chosen), device=chosen.device) < len(chosen)
    losses = term(torch.cat([chosen, rejected]), desirable, beta=beta, kl=kl[int(term.length_normalised)])
    # A pair is two examples and weighs as one; of an unpaired row there is one, and it weighs as one too.
    there = torch.cat([policy.chosen_len, policy.rejected_len]).view(2, -1) > 0
    return (losses.view(2, -1) * there).sum(0) / there.sum(0)


def mixture_of(spec: Spec | Mixture) -> Mixture:
    """What a recipe's `objective` stands for.

    Raises UserError for names and options that are none (with the near miss), for values that cannot be meant, and for
    an option that would be ignored.
    """
    if isinstance(spec, Mixture):
        return spec
    if not isinstance(spec, Mapping):
        one = objective_of(spec)
        return Mixture(((1.0, one),), one.name)
    if not spec:
        raise UserError("objective is empty; name one, as in objective: apo_zero")
    terms = [_term(key, value) for key, value in spec.items()]
    names = [term.name for _, term in terms]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"objective names {doubled} twice; add the weights up")
    plain = {name: dict(v) if isinstance(v, Mapping) else v for name, v in zip(names, spec.values(), strict=True)}
    return Mixture(tuple(terms), plain)


def title_of(plain: Any) -> str:
    """A plain `objective`, as run.json keeps it, in one line."""
    if not isinstance(plain, Mapping):
        return str(plain)
    parts = []
    for name, value in plain.items():
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = options.pop("weight", 1)
        told = f"({', '.join(f'{key}={option}' for key, option in options.items())})" if options else ""
        parts.append(f"{name}{told}" if weight == 1 else f"{weight:g} {name}{told}")
    return " + ".join(parts)


def _term(key: Any, value: Any) -> tuple[float, Objective]:
    one = objective_of(key)
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = _number(one.name, "weight", options.pop("weight", 1.0))
    if not weight > 0:
        raise UserError(f"objective {one.name}: weight is {weight:g}; it must be above 0, or leave the objective out")
    allowed = _options_of(one)
    normalised = options.pop("length_normalised", False)
    if not isinstance(normalised, bool):
        raise UserError(f"objective {one.name}: length_normalised is {normalised!r}; it is true or false")
    if normalised and (one.kind == "likelihood" or "chosen_len" in one.asks_for):
        raise UserError(f"objective {one.name}: length_normalised would be ignored, it sees to lengths itself")
    for name, option in options.items():
        if name == "beta":
            raise UserError(f"objective {one.name}: beta stands at the recipe's top; move it there")
        if name not in allowed:
            told = ", ".join([*allowed, "length_normalised", "weight"])
            near = near_miss(str(name), [*allowed, "length_normalised", "weight"])
            raise UserError(f"objective {one.name} has no option {name!r}{near}; allowed: {told}")
        _number(one.name, name, option)
    bound = replace(one, function=functools.partial(one.function, **options), length_normalised=normalised)
    _try_out(bound)
    return weight, bound


def _options_of(one: Objective) -> list[str]:
    """The parameters that a recipe may set: those with a number for default which the trainer does not offer."""
    parameters = list(inspect.signature(one.function).parameters.values())[2:]
    free = (p for p in parameters if p.name not in one.asks_for)
    return sorted(p.name for p in free if isinstance(p.default, int | float) and not isinstance(p.default, bool))


def _number(name: str, option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"objective {name}: {option} is {value!r}; it is a finite number")
    return float(value)


def _try_out(one: Objective) -> None:
    """Ask for the loss of one pair at the anchor, so that an option out of range fails before any work."""
    zero, length = torch.zeros(1), torch.ones(1)
    second = zero.bool() if one.kind == "unpaired" else zero
    try:
        one(zero, second, beta=0.1, kl=0.0, chosen_len=length, rejected_len=length)
    except UserError as error:
        raise UserError(f"objective {one.name}: {error}") from error
