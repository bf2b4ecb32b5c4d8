"""Token diagnostics: log-ratios of shared and edited tokens of a few pairs, and the exact KL to the model at the start.

They answer two questions that sums over responses cannot. Where does a response change: in the tokens that chosen and
rejected share (their longest common subsequence), or in the edited ones? And how far is the model from its start? The
answer is KL(policy || start) of the next token, in nats, exact over the vocabulary, and averaged over positions that
are spread evenly over the responses of the data. It is no estimate of the KL of whole responses: for that, responses
would have to be sampled from the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from apo.packing.layout import SIDES, response_mask
from clair.data.contrast import shared_tokens

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

MAX_PAIRS = 16
"""Maximal number of pairs to examine. A short run has one per `TRAINED_PER_PAIR` trained pairs."""
TRAINED_PER_PAIR = 100
POSITIONS = 128
"""Positions whose next-token distribution is stored, each a vocabulary of float32 on the host."""


class ExaminedTrainer(Protocol):
    """What token diagnostics and sample answers need of a trainer.

    `args` (an APOConfig), `model` and the datasets are Any, because transformers declares them as base classes or as
    optional, wider than a running trainer has them.
    """

    @property
    def args(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def train_dataset(self) -> Any: ...
    @property
    def eval_dataset(self) -> Any: ...
    @property
    def accelerator(self) -> Accelerator: ...

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """Enter eval mode without gradient, in the precision of a training step."""
        ...


@dataclass(frozen=True)
class TokenLogps:
    """A model's log-probs on the examined pairs, on the host.

    `tokens` has one [T] per response: the log-probs of its tokens, with chosen before rejected of each pair.
    `positions` has the log-probs of all next tokens at the stored positions, [P, vocabulary].
    """

    tokens: list[Tensor]
    positions: Tensor


class TokenDiagnostics:
    """Pairs to examine (id columns; unpaired rows have one response), with the log-probs of the model at the start."""

    def __init__(self, trainer: ExaminedTrainer, pairs: Sequence[dict[str, Any]]) -> None:
        self.pairs = [{f"{name}_ids": list(pair[f"{name}_ids"]) for name in ("prompt", *SIDES)} for pair in pairs]
        self._trained = [torch.tensor(response_mask(pair, side), dtype=torch.bool) for pair in pairs for side in SIDES]
        shared = [mask for pair in self.pairs for mask in shared_tokens(pair["chosen_ids"], pair["rejected_ids"])]
        self.shared = [
            torch.tensor(mask, dtype=torch.bool)[trained] for mask, trained in zip(shared, self._trained, strict=True)
        ]
        total = sum(len(mask) for mask in self.shared)
        stride = -(-total // POSITIONS)
        self._stored = torch.arange(total) % stride == 0
        self._trainer = trainer
        self.baseline = self.logps()

    def logps(self) -> TokenLogps:
        """Return the log-probs of the current model. Every process computes all of them."""
        model, device = self._trainer.model, self._trainer.accelerator.device
        tokens, positions, offset = [], [], 0
        for number, pair in enumerate(self.pairs):
            for side, trained in zip(SIDES, self._trained[2 * number : 2 * number + 2], strict=True):
                response = pair[f"{side}_ids"]
                if not response:
                    tokens.append(torch.zeros(0))
                    continue
                ids = torch.tensor([pair["prompt_ids"] + response], device=device)
                with self._trainer.evaluation_mode():
                    outputs = model(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        use_cache=False,
                        logits_to_keep=len(response) + 1,
                    )
                trained = trained.to(device)
                logps = outputs.logits[0, :-1][trained].float().log_softmax(-1)
                tokens.append(logps.gather(-1, ids[0, -len(response) :][trained, None]).squeeze(-1).cpu())
                positions.append(logps[self._stored[offset : offset + len(logps)].to(device)].cpu())
                offset += len(logps)
        return TokenLogps(tokens, torch.cat(positions))

    def measure(self) -> dict[str, float]:
        """Return the current `METRICS`. Those of shared and edited tokens exist only for pairs."""
        return diagnostic_metrics(self.baseline, self.logps(), self.shared)


METRICS = (
    "probe/kl",
    "probe/shared_chosen",
    "probe/edited_chosen",
    "probe/shared_rejected",
    "probe/edited_rejected",
    "probe/shared_falls",
    "probe/edited_falls",
)
"""KL in nats per token; mean log-ratio of a token, by response and kind; share of pairs in whose chosen response the
tokens of a kind together are less likely than at the start."""


def build_token_diagnostics(trainer: ExaminedTrainer, count: int | None) -> TokenDiagnostics | None:
    """Return diagnostics of `count` held-out pairs, or of trained pairs if none are held out; None without pairs.

    If `count` is None, the length of the run determines it.
    """
    if count is None:
        count = min(MAX_PAIRS, int(trained_pairs(trainer) / TRAINED_PER_PAIR))
    pairs = spread_pairs(trainer, count)
    return TokenDiagnostics(trainer, pairs) if pairs else None


def trained_pairs(trainer: ExaminedTrainer) -> float:
    """Return the number of pairs that the run trains on, with each pair counted once per epoch."""
    args = trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(trainer.train_dataset) / step
    return steps * step


def spread_pairs(trainer: ExaminedTrainer, count: int) -> list[dict[str, Any]]:
    """Return `count` held-out pairs, or trained pairs if none are held out, spread evenly over the dataset.

    The result is empty if several datasets are held out.
    """
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if isinstance(dataset, dict) or not count:
        return []
    stride = max(1, len(dataset) // count)
    return [dataset[row] for row in range(0, len(dataset), stride)][:count]


def diagnostic_metrics(baseline: TokenLogps, current: TokenLogps, shared: Sequence[Tensor]) -> dict[str, float]:
    """Return the metrics of two measurements. `shared` has the mask of shared tokens of each response, in order."""
    policy, reference = current.positions.double(), baseline.positions.double()
    metrics = {"probe/kl": (policy.exp() * (policy - reference)).sum(-1).mean().item()}
    ratios = [(now - start).double() for now, start in zip(current.tokens, baseline.tokens, strict=True)]
    if not all(len(ratio) for ratio in ratios):
        return metrics
    for number, side in enumerate(SIDES):
        masked = list(zip(ratios[number::2], shared[number::2], strict=True))
        for kind, is_shared in (("shared", True), ("edited", False)):
            selected = [ratio[mask == is_shared] for ratio, mask in masked]
            tokens = torch.cat(selected)
            if len(tokens):
                metrics[f"probe/{kind}_{side}"] = tokens.mean().item()
            falls = [float(ratio.sum() < 0) for ratio in selected if len(ratio)]
            if side == "chosen" and falls:
                metrics[f"probe/{kind}_falls"] = sum(falls) / len(falls)
    return metrics
