"""The probe: a few pairs looked at token by token, ten times in a run, against the model before the first step.

Two questions that sums over whole responses cannot answer. Where a response moves: in the tokens that chosen and
rejected share (their longest common subsequence), or in those that were edited. And how far the model is from its
reference: KL(policy || reference) of the next token, exact over the whole vocabulary, in nats, the mean over positions
spread evenly over the responses, each in the context that the data give it. That is no estimate of the KL of whole
responses drawn from the policy, for which responses would have to be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from apo.packing.logps import SIDES, response_mask
from clair.data.contrast import shared_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from apo.training.trainer import APOTrainer

PAIRS = 16
"""Pairs in a probe, at most; fewer in a short run, one for `TRAINED_FOR_ONE` that are trained."""
TRAINED_FOR_ONE = 100
POSITIONS = 128
"""Of whose next token the whole distribution is kept: so many times the vocabulary in float32, on the host."""


@dataclass(frozen=True)
class View:
    """How a model sees the probe: log-probs of the tokens of each response, chosen before rejected of each pair, and
    the next token's log-probs at the probe's positions [P, vocabulary]. On the host."""

    tokens: list[Tensor]
    positions: Tensor


class Probe:
    """Pairs (id columns; unpaired rows have one response), which of their tokens are shared, and the first view."""

    def __init__(self, trainer: APOTrainer, pairs: Sequence[dict[str, Any]]) -> None:
        self.pairs = [{f"{name}_ids": list(pair[f"{name}_ids"]) for name in ("prompt", *SIDES)} for pair in pairs]
        self._trained = [torch.tensor(response_mask(pair, side), dtype=torch.bool) for pair in pairs for side in SIDES]
        shared = [mark for pair in self.pairs for mark in shared_tokens(pair["chosen_ids"], pair["rejected_ids"])]
        marks = [torch.tensor(mark, dtype=torch.bool) for mark in shared]
        self.shared = [mark[trained] for mark, trained in zip(marks, self._trained, strict=True)]
        total = sum(len(mark) for mark in self.shared)
        apart = -(-total // POSITIONS)
        self._kept = torch.arange(total) % apart == 0
        self.before = self.view(trainer)

    def view(self, trainer: APOTrainer) -> View:
        """See the pairs by the model as it is. Every process sees all of them."""
        model, device = trainer.model, trainer.accelerator.device
        tokens, positions, place = [], [], 0
        for number, pair in enumerate(self.pairs):
            for side, trained in zip(SIDES, self._trained[2 * number : 2 * number + 2], strict=True):
                response = pair[f"{side}_ids"]
                if not response:
                    tokens.append(torch.zeros(0))
                    continue
                ids = torch.tensor([pair["prompt_ids"] + response], device=device)
                with trainer.evaluation_mode():
                    seen = model(
                        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False,
                        logits_to_keep=len(response) + 1,
                    )  # fmt: skip
                trained = trained.to(device)
                logps = seen.logits[0, :-1][trained].float().log_softmax(-1)
                tokens.append(logps.gather(-1, ids[0, -len(response) :][trained, None]).squeeze(-1).cpu())
                positions.append(logps[self._kept[place : place + len(logps)].to(device)].cpu())
                place += len(logps)
        return View(tokens, torch.cat(positions))

    def measure(self, trainer: APOTrainer) -> dict[str, float]:
        """The metrics of a look: `METRICS`, those about edits only where there are pairs."""
        return compare(self.before, self.view(trainer), self.shared)


METRICS = (
    "probe/kl", "probe/shared_chosen", "probe/edited_chosen", "probe/shared_rejected", "probe/edited_rejected",
    "probe/shared_falls", "probe/edited_falls",
)  # fmt: skip
"""KL in nats a token; mean log-ratio of a token, by response and kind; share of pairs whose chosen response has become
less likely in its tokens of a kind, taken together."""


def probe_of(trainer: APOTrainer, asked: int | None) -> Probe | None:
    """A probe of `asked` pairs (None: by the length of the run), held out if there are any, else trained; or None."""
    args = trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(trainer.train_dataset) / step
    count = min(PAIRS, int(steps * step / TRAINED_FOR_ONE)) if asked is None else asked
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if isinstance(dataset, dict) or not count:
        return None
    apart = max(1, len(dataset) // count)
    return Probe(trainer, [dataset[row] for row in range(0, len(dataset), apart)][:count])


def compare(before: View, now: View, shared: Sequence[Tensor]) -> dict[str, float]:
    """The metrics of two views of one probe; `shared` the marks of `shared_tokens`, a pair after the other."""
    policy, reference = now.positions.double(), before.positions.double()
    found = {"probe/kl": (policy.exp() * (policy - reference)).sum(-1).mean().item()}
    ratios = [(after - then).double() for after, then in zip(now.tokens, before.tokens, strict=True)]
    if not all(len(side) for side in ratios):
        return found
    for number, side in enumerate(SIDES):
        own = list(zip(ratios[number::2], shared[number::2], strict=True))
        for kind, wanted in (("shared", True), ("edited", False)):
            parts = [ratio[mark == wanted] for ratio, mark in own]
            tokens = torch.cat(parts)
            if len(tokens):
                found[f"probe/{kind}_{side}"] = tokens.mean().item()
            falls = [float(part.sum() < 0) for part in parts if len(part)]
            if side == "chosen" and falls:
                found[f"probe/{kind}_falls"] = sum(falls) / len(falls)
    return found
