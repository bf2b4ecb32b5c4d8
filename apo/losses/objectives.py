"""Preference objectives: pure, unreduced functions of log-ratios or log-probs, one loss per pair or per response.

There are three kinds. The names of the first two parameters say which kind a function is:

    paired      (chosen [B], rejected [B], chosen_len [B], rejected_len [B], *, beta)                -> losses [B]
    unpaired    (logratio [N], desirable [N] bool, *, beta, kl)                                      -> losses [N]
    likelihood  (chosen_logp [B], rejected_logp [B], chosen_len [B], rejected_len [B], *, beta)      -> losses [B]

Your own function with such a signature is an objective too. The parameters after the first two are optional: the
trainer passes those that the function declares. Any other parameter whose default is a number is an option that a
recipe may set (mixture.py).

Notation in the formulas: a log-ratio is h = log pi_theta(y|x) - log pi_ref(y|x), in nats, summed over the response's
tokens including the end of turn; the reward is r = beta * h; _w marks the chosen response and _l the rejected one; |y|
is a response's length in tokens. "Start" is the loss of the untrained policy, where h = 0.

An equation without another source is from "Anchored Preference Optimization" (arXiv 2408.06266); the paper writes the
two APO losses lower by 1. The functions compute losses only: rewards, margins and accuracies do not depend on the
objective, and `apo.monitoring.metrics` logs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import logsigmoid

from clair.core.errors import UserError, near_miss

if TYPE_CHECKING:
    from torch import Tensor

ObjectiveKind = Literal["paired", "unpaired", "likelihood"]


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-zero: always raise the chosen response and lower the rejected one, relative to the anchor r = 0.

        loss = sigmoid(-r_w) + sigmoid(r_l)

    Use it when the chosen responses are better than the model's own.

    Start: 1. Range: (0, 2). Source: Eq. 7.
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-down: lower both responses, the rejected one further.

        loss = sigmoid(r_w) + sigmoid(-(r_w - r_l))

    Use it when the model is better than the chosen responses.

    Start: 1. Range: (0, 2). Source: Eq. 8.
    """
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def apo_zero_unpaired(
    logratio: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero for single responses with a label.

        loss = desirable_weight * sigmoid(-r)    if desirable
               undesirable_weight * sigmoid(r)   otherwise

    Both weights are > 0. On both responses of a pair, the mean is exactly half of `apo_zero`.

    Start: 1/2. Range: (0, 1), times the weight. Source: Eq. 7, response by response.
    """
    return _sigmoid_loss(beta * logratio, desirable, desirable_weight, undesirable_weight)


def apo_hinge_zero(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-zero with hinges: a constant gradient until the reward is past the anchor by 1, on the right side, then 0.

        loss = max(0, 1 - r_w) + max(0, 1 + r_l)

    The formula is recovered from the authors' report (margin 1, beta 0.1) and has one ambiguity: Eq. 10 of the paper
    multiplies r by beta once more; its stopping rule, like this function, counts beta once.

    Start: 2. Range: [0, inf). Source: APO-hinge-zero (arXiv 2508.08466).
    """
    return (1 - beta * chosen).relu() + (1 + beta * rejected).relu()


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Direct Preference Optimization: increase the margin r_w - r_l, whichever way the two rewards move.

        loss = -(1 - e) * log sigmoid(r_w - r_l) - e * log sigmoid(r_l - r_w)

    e = `label_smoothing`, in [0, 0.5), is the probability that a label is wrong ("conservative DPO", as in TRL's CPO).
    With e > 0 the minimum lies at sigmoid(r_w - r_l) = 1 - e.

    Start: log 2. Range: (0, inf). Source: Eq. 7 of DPO (arXiv 2305.18290).
    """
    right, flipped = _log_losses(beta * (chosen - rejected), label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * flipped if label_smoothing else right


def robust(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """DPO's loss, unbiased when a share e = `label_smoothing` of the labels is flipped.

        loss = (-(1 - e) * log sigmoid(r_w - r_l) + e * log sigmoid(r_l - r_w)) / (1 - 2 e)

    e lies in [0, 0.5). The same as TRL's "robust". The gradient does not vanish on pairs with a large margin.

    Start: log 2. Range: unbounded when e > 0. Source: arXiv 2403.00409.
    """
    right, flipped = _log_losses(beta * (chosen - rejected), label_smoothing)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, chosen_len: Tensor, rejected_len: Tensor, *, beta: float = 0.1) -> Tensor:
    """Identity Preference Optimization: move every pair to one fixed margin, and no further.

        loss = (h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2

    The paper sums h over tokens. The mean over tokens, as in TRL, was confirmed to TRL by the paper's authors.
    A beta near 1 is usual.

    Start: 1 / (4 beta^2). Range: [0, inf). Source: Eq. 17 of IPO (arXiv 2310.12036).
    """
    difference = chosen / chosen_len.clamp(min=1) - rejected / rejected_len.clamp(min=1)
    return (difference - 1 / (2 * beta)) ** 2


def kto(
    logratio: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    kl: Tensor | float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky Optimization: single responses with a label, relative to the policy's divergence.

        loss = desirable_weight * sigmoid(z0 - r)     if desirable
               undesirable_weight * sigmoid(r - z0)   otherwise
        z0   = beta * max(0, kl), without gradient

    `kl` is the mean log-ratio, in nats, of prompts combined with other prompts' responses; the trainer estimates it.
    The weights, the paper's lambda_D and lambda_U, are > 0. With kl <= 0 this is `apo_zero_unpaired`.

    Start: 1/2. Range: (0, 1), times the weight. Source: Eq. 8 of KTO (arXiv 2402.01306).
    """
    anchor = torch.as_tensor(kl).detach().clamp(min=0)
    return _sigmoid_loss(beta * (logratio - anchor), desirable, desirable_weight, undesirable_weight)


def sft(chosen_logp: Tensor, rejected_logp: Tensor, chosen_len: Tensor, rejected_len: Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen responses; needs no reference model and ignores the rejected ones.

        loss = -log pi(y_w|x) / |y_w|

    Every pair has the same weight, whatever its length, as under the other objectives here. TRL's "sft" divides the
    batch's sum by the batch's tokens, so there a long response weighs more and the batch size matters.

    Start: the model's loss, in nats per token. Range: [0, inf).
    """
    return -chosen_logp / chosen_len.clamp(min=1)


def simpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_len: Tensor,
    rejected_len: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> Tensor:
    """SimPO: raise the chosen response's mean log-prob above the rejected one's by a target margin; no reference model.

        loss = -log sigmoid(beta * log pi(y_w|x) / |y_w| - beta * log pi(y_l|x) / |y_l| - gamma)

    `gamma` >= 0 is the target margin of the scaled mean log-probs. (TRL's CPO subtracts gamma / beta before it
    multiplies by beta, which is the same.) A beta of 2 or more is usual.

    Start: depends on the model. Range: (0, inf). Source: SimPO (arXiv 2405.14734).
    """
    if not gamma >= 0:
        raise UserError(f"gamma is {gamma}; it must be 0 or above")
    difference = chosen_logp / chosen_len.clamp(min=1) - rejected_logp / rejected_len.clamp(min=1)
    return -logsigmoid(beta * difference - gamma)


def _log_losses(margin: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid(margin) and -log sigmoid(-margin): DPO's loss if the label is right, and if it is flipped."""
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing is {label_smoothing}; it is a share of wrong labels, from 0 to below 0.5")
    return -logsigmoid(margin), -logsigmoid(-margin)


def _sigmoid_loss(reward: Tensor, desirable: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """sigmoid(-reward) if desirable, else sigmoid(reward), times the weight of the label.

    Not written as 1 - sigmoid(reward), whose gradient in float32 is 0 at a reward of 20.
    """
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not weight > 0:
            raise UserError(f"{name} is {weight}; it must be above 0, or leave such rows out")
    losses = reward.where(~desirable, -reward).sigmoid()
    return (desirable_weight * losses).where(desirable, undesirable_weight * losses)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        apo_zero,
        apo_down,
        apo_hinge_zero,
        apo_zero_unpaired,
        dpo,
        robust,
        ipo,
        kto,
        sft,
        simpo,
    )
}
"""The objectives that a recipe can name."""

_KINDS: dict[tuple[str, ...], ObjectiveKind] = {
    ("chosen", "rejected"): "paired",
    ("logratio", "desirable"): "unpaired",
    ("chosen_logp", "rejected_logp"): "likelihood",
}
_OPTIONAL_INPUTS: dict[ObjectiveKind, frozenset[str]] = {
    "paired": frozenset({"beta", "chosen_len", "rejected_len"}),
    "unpaired": frozenset({"beta", "kl"}),
    "likelihood": frozenset({"beta", "chosen_len", "rejected_len"}),
}


@dataclass(frozen=True)
class Objective:
    """A loss function, its kind, and the names of the optional inputs that its signature declares.

    With `length_normalised`, log-ratios (and KTO's kl) are means over the response's tokens instead of sums.
    """

    name: str
    function: Callable[..., Tensor]
    kind: ObjectiveKind
    inputs: frozenset[str]
    length_normalised: bool = False

    @property
    def needs_reference(self) -> bool:
        """True if the objective reads log-ratios, which need a reference model."""
        return self.kind != "likelihood"

    def __call__(self, first: Tensor, second: Tensor, **optional: Any) -> Tensor:
        """Return the unreduced losses; of `optional`, pass on only what the function declares.

        Raises UserError if the losses do not have the shape of `first`.
        """
        losses = self.function(first, second, **{key: optional[key] for key in self.inputs})
        if losses.shape != first.shape:
            raise UserError(
                f"objective {self.name} gave a loss of shape {list(losses.shape)} for inputs of shape "
                f"{list(first.shape)}; return one loss each, unreduced"
            )
        return losses


def resolve_objective(spec: str | Callable[..., Tensor] | Objective) -> Objective:
    """Return the objective for a name or a function. Mixtures and options are `mixture.resolve_mixture`'s.

    Raises UserError for an unknown name (with the nearest known one), and for a function whose parameters fit no kind.
    """
    if isinstance(spec, Objective):
        return spec
    if isinstance(spec, str):
        if spec not in OBJECTIVES:
            names = sorted(OBJECTIVES)
            raise UserError(f"unknown objective {spec!r}{near_miss(spec, names)}; allowed: {', '.join(names)}")
        spec = OBJECTIVES[spec]
    if not callable(spec):
        raise UserError(f"objective is {type(spec).__name__}, not a name or a function; see docs/objectives.md")
    name = getattr(spec, "__name__", None) or getattr(getattr(spec, "func", None), "__name__", type(spec).__name__)
    kind, inputs = _read_signature(name, spec)
    return Objective(name, spec, kind, inputs)


def _read_signature(name: str, function: Callable[..., Tensor]) -> tuple[ObjectiveKind, frozenset[str]]:
    """Return the kind and the optional inputs that the function's parameters declare."""
    parameters = list(inspect.signature(function).parameters.values())
    first_two = tuple(parameter.name for parameter in parameters[:2])
    kind = _KINDS.get(first_two)
    if kind is None:
        allowed = " or ".join(f"({', '.join(pair)}, ...)" for pair in _KINDS)
        raise UserError(
            f"objective {name} takes ({', '.join(first_two)}, ...); name its first two parameters {allowed}"
        )
    inputs = set()
    for parameter in parameters[2:]:
        if parameter.name in _OPTIONAL_INPUTS[kind]:
            inputs.add(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            optional = ", ".join(sorted(_OPTIONAL_INPUTS[kind]))
            raise UserError(
                f"objective {name} requires {parameter.name!r}, which a {kind} objective is not given; "
                f"it may take {optional}, and any other parameter needs a default"
            )
    return kind, frozenset(inputs)
