"""Objectives: pure, unreduced functions of log-ratios (nats) or log-probs. One loss per pair or per response out.

Three kinds, told apart by the names of the first two parameters, so that a function of yours is one as well:

    paired      (chosen [B], rejected [B], chosen_len [B], rejected_len [B], *, beta)                -> losses [B]
    unpaired    (logratio [N], desirable [N] bool, *, beta, kl)                                      -> losses [N]
    likelihood  (chosen_logp [B], rejected_logp [B], chosen_len [B], rejected_len [B], *, beta)      -> losses [B]

Log-ratios are log pi_theta(y|x) - log pi_ref(y|x) in nats, summed over the response's tokens with the end of turn.
The reward is r = beta * logratio. Everything after the first two parameters is passed only where the function asks for
it; what it has besides, with a number for default, is an option that a recipe may set (mixture.py). Equations are those
of "Anchored Preference Optimization" (arXiv 2408.06266) where no other paper is named; the two APO losses stand there 1
lower. Nothing here measures: rewards, margins and accuracies are the same for all and are logged once (dynamics.py).
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

Kind = Literal["paired", "unpaired", "likelihood"]


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """sigmoid(-r_w) + sigmoid(r_l), Eq. 7: the winner always goes up and the loser always down, from the anchor r = 0.

    For winners that are better than the model's own answers. Starts at 1 and lies in (0, 2).
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """sigmoid(r_w) + sigmoid(-(r_w - r_l)), Eq. 8: both go down, the loser further.

    For a model that is better than the winners. Starts at 1 and lies in (0, 2).
    """
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def apo_zero_unpaired(
    logratio: Tensor, desirable: Tensor, *, beta: float = 0.1, desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """sigmoid(-r) where desirable, sigmoid(r) where not: on pairs, exactly half of `apo_zero`. Starts at 1/2.

    Each loss is multiplied by the weight of its class, > 0.
    """
    return _toward(beta * logratio, desirable, desirable_weight, undesirable_weight)


def apo_hinge_zero(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - r_w) + max(0, 1 + r_l): APO-zero with hinges, the full pull until a response is 1 past the anchor.

    APO-hinge-zero of arXiv 2508.08466, recovered from the authors' report (margin 1, beta 0.1), one ambiguity: its
    eq. 10 writes beta into r too, its stopping rule counts it once, as here. Starts at 2.
    """
    return (1 - beta * chosen).relu() + (1 + beta * rejected).relu()


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l), Eq. 7 of DPO (arXiv 2305.18290): only the difference counts. Starts at log 2.

    `label_smoothing` e in [0, 0.5) is the chance that a label is wrong, as TRL's CPO smooths ("conservative DPO"):
    -(1 - e) log sigmoid(r_w - r_l) - e log sigmoid(r_l - r_w), least where sigmoid(r_w - r_l) = 1 - e.
    """
    right, wrong = _both_ways(beta * (chosen - rejected), label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong if label_smoothing else right


def robust(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """DPO's loss made unbiased where a share e = `label_smoothing` of labels is flipped (arXiv 2403.00409).

    ((1 - e) * -log sigmoid(r_w - r_l) - e * -log sigmoid(r_l - r_w)) / (1 - 2e), e in [0, 0.5), as TRL's "robust".
    May be negative; its gradient never vanishes on a pair far in the right order. Starts at log 2.
    """
    right, wrong = _both_ways(beta * (chosen - rejected), label_smoothing)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, chosen_len: Tensor, rejected_len: Tensor, *, beta: float = 0.1) -> Tensor:
    """(h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2 with h the log-ratio, Eq. 17 of IPO (arXiv 2310.12036).

    The paper writes h summed over tokens; here it is the mean over them, as in TRL, whose authors had it confirmed by
    the paper's. Every pair is drawn towards one margin and no further. Starts at 1 / (4 beta^2): a beta near 1 is sane.
    """
    difference = chosen / chosen_len.clamp(min=1) - rejected / rejected_len.clamp(min=1)
    return (difference - 1 / (2 * beta)) ** 2


def kto(
    logratio: Tensor, desirable: Tensor, *, beta: float = 0.1, kl: Tensor | float = 0.0, desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """sigmoid(z0 - r) where desirable, sigmoid(r - z0) where not, Eq. 8 of KTO (arXiv 2402.01306).

    z0 = beta * max(0, kl) is the anchor, without gradient; `kl` in nats is the mean log-ratio of mismatched prompts
    and responses (the trainer estimates it). With kl = 0 this is `apo_zero_unpaired`. Starts at 1/2. Each loss is
    multiplied by the weight of its class, the paper's lambda_D and lambda_U, > 0.
    """
    anchor = torch.as_tensor(kl).detach().clamp(min=0)
    return _toward(beta * (logratio - anchor), desirable, desirable_weight, undesirable_weight)


def sft(chosen_logp: Tensor, rejected_logp: Tensor, chosen_len: Tensor, rejected_len: Tensor) -> Tensor:
    """-log pi(y_w|x) / |y_w|: supervised fine-tuning on the winners, nats per token, no reference, losers unread.

    Each pair weighs the same whatever its length, as under every other objective here. (TRL's "sft" divides the sum
    over the batch by the tokens of the batch, so there a long answer weighs more and the batch size matters.)
    """
    return -chosen_logp / chosen_len.clamp(min=1)


def simpo(
    chosen_logp: Tensor, rejected_logp: Tensor, chosen_len: Tensor, rejected_len: Tensor, *, beta: float = 2.0,
    gamma: float = 0.5,
) -> Tensor:  # fmt: skip
    """-log sigmoid(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma), SimPO (arXiv 2405.14734).

    No reference. `gamma` is the margin that the mean log-probs, times beta, are asked to keep; >= 0. (TRL's CPO takes
    gamma / beta off inside the bracket of beta, which is the same.) Wants a beta of 2 or more.
    """
    if not gamma >= 0:
        raise UserError(f"gamma is {gamma}; it must be 0 or above")
    difference = chosen_logp / chosen_len.clamp(min=1) - rejected_logp / rejected_len.clamp(min=1)
    return -logsigmoid(beta * difference - gamma)


def _both_ways(margin: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid of a margin, and of its opposite: what DPO loses if the label is right, and if it is flipped."""
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing is {label_smoothing}; it is a share of wrong labels, from 0 to below 0.5")
    return -logsigmoid(margin), -logsigmoid(-margin)


def _toward(reward: Tensor, desirable: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """sigmoid(-reward) where desirable, else sigmoid(reward). Never 1 - sigmoid: its gradient at 20 is 0 in float32."""
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not weight > 0:
            raise UserError(f"{name} is {weight}; it must be above 0, or leave such rows out")
    losses = reward.where(~desirable, -reward).sigmoid()
    return (desirable_weight * losses).where(desirable, undesirable_weight * losses)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        apo_zero, apo_down, apo_hinge_zero, apo_zero_unpaired,
        dpo, robust, ipo, kto, sft, simpo,
    )
}  # fmt: skip
"""The objectives a recipe can name."""

_FIRST_TWO: dict[tuple[str, str], Kind] = {
    ("chosen", "rejected"): "paired",
    ("logratio", "desirable"): "unpaired",
    ("chosen_logp", "rejected_logp"): "likelihood",
}
_MAY_ASK_FOR: dict[Kind, frozenset[str]] = {
    "paired": frozenset({"beta", "chosen_len", "rejected_len"}),
    "unpaired": frozenset({"beta", "kl"}),
    "likelihood": frozenset({"beta", "chosen_len", "rejected_len"}),
}


@dataclass(frozen=True)
class Objective:
    """A loss function, its kind, and which of the offered values it asks for.

    With `length_normalised`, log-ratios (and KTO's kl) are means over the response's tokens in place of sums.
    """

    name: str
    function: Callable[..., Tensor]
    kind: Kind
    asks_for: frozenset[str]
    length_normalised: bool = False

    @property
    def needs_reference(self) -> bool:
        """Whether log-ratios go in, for which a reference model has to run."""
        return self.kind != "likelihood"

    def __call__(self, first: Tensor, second: Tensor, **offered: Any) -> Tensor:
        """The function's losses, unreduced. Raises UserError where their shape is not that of the inputs."""
        losses = self.function(first, second, **{key: offered[key] for key in self.asks_for})
        if losses.shape != first.shape:
            raise UserError(
                f"objective {self.name} gave a loss of shape {list(losses.shape)} for inputs of shape "
                f"{list(first.shape)}; return one loss each, unreduced"
            )
        return losses


def objective_of(spec: str | Callable[..., Tensor] | Objective) -> Objective:
    """The objective a name or a function stands for; mixtures and options are in mixture.py.

    Raises UserError for a name that is none (with the near miss), and for a function whose parameters fit no kind.
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
    kind, asks_for = _signature(name, spec)
    return Objective(name, spec, kind, asks_for)


def _signature(name: str, function: Callable[..., Tensor]) -> tuple[Kind, frozenset[str]]:
    parameters = list(inspect.signature(function).parameters.values())
    first_two = tuple(parameter.name for parameter in parameters[:2])
    kind = _FIRST_TWO.get(first_two)  # type: ignore[arg-type]
    if kind is None:
        allowed = " or ".join(f"({', '.join(pair)}, ...)" for pair in _FIRST_TWO)
        found = ", ".join(first_two)
        raise UserError(f"objective {name} takes ({found}, ...); name its first two parameters {allowed}")
    asks_for = set()
    for parameter in parameters[2:]:
        if parameter.name in _MAY_ASK_FOR[kind]:
            asks_for.add(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            offered = ", ".join(sorted(_MAY_ASK_FOR[kind]))
            raise UserError(
                f"objective {name} asks for {parameter.name!r}, which a {kind} objective is not offered; "
                f"it may ask for {offered}, other parameters need a default"
            )
    return kind, frozenset(asks_for)
