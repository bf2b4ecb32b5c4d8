"""The `objective` of a recipe: one objective, one with options, or a weighted sum of several.

    objective: apo_zero
    objective: {dpo: {label_smoothing: 0.1}}
    objective: {apo_zero: 1.0, sft: 0.1}
    objective: {apo_zero: {weight: 1.0, length_normalised: true}, sft: 0.1}

A number is a weight. The options of an objective are the parameters of its function that have a number as default and
are not inputs of its kind (beta, kl, lengths), and two more: `weight`, and `length_normalised` if it reads log-ratios.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from apo.losses.objectives import Objective, resolve_objective
from clair.core.errors import UserError, near_miss

if TYPE_CHECKING:
    from torch import Tensor

    from apo.packing.logps import PairLogps

Spec = str | Callable[..., Any] | Mapping[Any, Any] | Objective


@dataclass(frozen=True)
class Mixture:
    """Objectives with their weights. A single objective is a mixture of one term with weight 1."""

    terms: tuple[tuple[float, Objective], ...]
    spec: str | dict[str, Any]
    """The recipe's value as plain data, with functions replaced by their names."""

    @property
    def name(self) -> str:
        """The mixture in one line, for model cards and plots, such as `apo_zero + 0.1 sft`."""
        return objective_title(self.spec)

    @property
    def needs_reference(self) -> bool:
        """True if any term reads log-ratios."""
        return any(term.needs_reference for _, term in self.terms)

    @property
    def needs_divergence(self) -> bool:
        """True if any term reads KTO's kl, for which the trainer also runs mismatched prompts and responses."""
        return any("kl" in term.inputs for _, term in self.terms)

    @property
    def paired_only_reason(self) -> str | None:
        """Why rows with a single response cannot be trained with this mixture, or None if they can.

        Unpaired objectives read one response at a time; `sft` beside them reads the desirable ones.
        """
        paired = next((term.name for _, term in self.terms if term.kind != "unpaired" and term.name != "sft"), None)
        if paired is not None:
            return f"{paired} needs pairs"
        return None if any(term.kind == "unpaired" for _, term in self.terms) else "sft alone would read no label"

    @property
    def class_weights(self) -> tuple[float, float]:
        """The total weights of a desirable and of an undesirable row, summed over the unpaired terms."""
        terms = [(w, getattr(t.function, "keywords", {})) for w, t in self.terms if t.kind == "unpaired"]

        def total(name: str) -> float:
            return sum(weight * options.get(name, 1.0) for weight, options in terms)

        return total("desirable_weight"), total("undesirable_weight")

    def losses(
        self, policy: PairLogps, reference: tuple[Tensor, Tensor] | None, *, beta: float, kl: Any = (0.0, 0.0)
    ) -> Tensor:
        """Return one loss per pair, [B]: the weighted sum of the terms.

        `reference` holds the reference model's log-probs of chosen and rejected, [B] each. `kl` is KTO's divergence
        twice: for summed log-ratios, and per token. An unpaired row is a pair whose other response has no tokens.
        """
        weighted = [weight * _losses(term, policy, reference, beta, kl) for weight, term in self.terms]
        return functools.reduce(torch.add, weighted)


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
    # A pair is two examples with the weight of one; an unpaired row is one example, with the same weight.
    present = torch.cat([policy.chosen_len, policy.rejected_len]).view(2, -1) > 0
    return (losses.view(2, -1) * present).sum(0) / present.sum(0)


def resolve_mixture(spec: Spec | Mixture) -> Mixture:
    """Return the mixture that a recipe's `objective` specifies.

    Raises UserError for an unknown objective or option (with the nearest known one), for a value out of range, and for
    an option that would be ignored.
    """
    if isinstance(spec, Mixture):
        return spec
    if not isinstance(spec, Mapping):
        objective = resolve_objective(spec)
        return Mixture(((1.0, objective),), objective.name)
    if not spec:
        raise UserError("objective is empty; name one, as in objective: apo_zero")
    terms = [_resolve_term(key, value) for key, value in spec.items()]
    names = [term.name for _, term in terms]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"objective names {duplicate} twice; add the weights up")
    plain = {name: dict(v) if isinstance(v, Mapping) else v for name, v in zip(names, spec.values(), strict=True)}
    return Mixture(tuple(terms), plain)


def objective_title(spec: Any) -> str:
    """Return an `objective` of plain data, such as run.json holds, as one line."""
    if not isinstance(spec, Mapping):
        return str(spec)
    terms = []
    for name, value in spec.items():
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = options.pop("weight", 1)
        arguments = f"({', '.join(f'{key}={option}' for key, option in options.items())})" if options else ""
        terms.append(f"{name}{arguments}" if weight == 1 else f"{weight:g} {name}{arguments}")
    return " + ".join(terms)


def _resolve_term(key: Any, value: Any) -> tuple[float, Objective]:
    """Return one term's weight and its objective with the options bound."""
    objective = resolve_objective(key)
    name = objective.name
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = _finite_number(name, "weight", options.pop("weight", 1.0))
    if not weight > 0:
        raise UserError(f"objective {name}: weight is {weight:g}; it must be above 0, or leave the objective out")
    normalised = options.pop("length_normalised", False)
    if not isinstance(normalised, bool):
        raise UserError(f"objective {name}: length_normalised is {normalised!r}; it is true or false")
    if normalised and (objective.kind == "likelihood" or "chosen_len" in objective.inputs):
        raise UserError(f"objective {name}: length_normalised would be ignored, since {name} divides by lengths itself")
    allowed = [*_option_names(objective), "length_normalised", "weight"]
    for option, number in options.items():
        if option == "beta":
            raise UserError(f"objective {name}: beta is a key of the recipe's top level; move it there")
        if option not in allowed:
            near = near_miss(str(option), allowed)
            raise UserError(f"objective {name} has no option {option!r}{near}; allowed: {', '.join(allowed)}")
        _finite_number(name, option, number)
    bound = replace(objective, function=functools.partial(objective.function, **options), length_normalised=normalised)
    _check_options(bound)
    return weight, bound


def _option_names(objective: Objective) -> list[str]:
    """The parameters that a recipe may set: those with a number as default that the trainer does not pass."""
    parameters = list(inspect.signature(objective.function).parameters.values())[2:]
    options = (p for p in parameters if p.name not in objective.inputs)
    return sorted(p.name for p in options if isinstance(p.default, int | float) and not isinstance(p.default, bool))


def _finite_number(name: str, option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"objective {name}: {option} is {value!r}; it is a finite number")
    return float(value)


def _check_options(objective: Objective) -> None:
    """Compute the loss of one untrained pair, so that an option out of range fails before any work."""
    zero, length = torch.zeros(1), torch.ones(1)
    second = zero.bool() if objective.kind == "unpaired" else zero
    try:
        objective(zero, second, beta=0.1, kl=0.0, chosen_len=length, rejected_len=length)
    except UserError as error:
        raise UserError(f"objective {objective.name}: {error}") from error
