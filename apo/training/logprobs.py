"""LogprobComputer: log-probs of batches of pairs, by policy and reference alike, in packed rows if those are exact."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from trl.trainer.utils import use_adapter

from apo.data.tokenize import first_rows
from apo.monitoring.failures import is_out_of_memory
from apo.monitoring.metrics import token_counts
from apo.packing.async_copy import to_device
from apo.packing.batch import STATE, PairBatch
from apo.packing.layout import crop_around_divergence, pack_bins, packed_length
from apo.packing.logps import PairLogps, PairLogpsFunction, padded_logps
from apo.packing.packed_model import enable_packing_if_exact, packed_logps

if TYPE_CHECKING:
    from accelerate import Accelerator

    from apo.training.trainer_config import APOConfig
    from clair.inference.generation.soft_prompt import SoftPrompt


class LogprobComputer:
    """Computes `PairLogps` of a batch with any model: packed, or in TRL's stacked batch by `pair_logps`.

    Packing is on after `enable_packing` if the models support it. It stays off for a `pair_logps` of the user's.
    `current_batch` is the batch of the latest forward pass.
    """

    def __init__(self, args: APOConfig, accelerator: Accelerator, pair_logps: PairLogpsFunction | None = None) -> None:
        self.args, self.accelerator = args, accelerator
        self.pair_logps = pair_logps or padded_logps
        self.is_packed = False
        self.current_batch: PairBatch | None = None
        self.soft_prompt: SoftPrompt | None = None
        """Of the policy: pairs with a state of their user are marked for it."""
        self._may_pack = pair_logps is None and args.shared_prefix

    def __call__(
        self, model: torch.nn.Module, batch: PairBatch, *, for_users: bool = True, **options: Any
    ) -> PairLogps:
        """`PairLogps` of a batch. `options` go to the model; packed rows have none.

        Unless `for_users`, as for a reference, without the soft prompt.
        """
        self.current_batch, device, prompt = batch, self.args.device, self.soft_prompt
        with_state = (
            [(pair, e[STATE]) for pair, e in enumerate(batch.examples) if STATE in e] if prompt and for_users else []
        )
        if prompt is None or not with_state:
            marked = contextlib.nullcontext()
        else:
            marked = prompt.using(torch.tensor([state for _, state in with_state]))
        with marked:
            if self.is_packed:
                assert not options
                row = batch.row(device)
                if prompt is not None and with_state:
                    starts = [(0, row.spans[pair].start) for pair, _ in with_state]
                    row = dataclasses.replace(row, input_ids=_marked(prompt, row.input_ids, starts))
                return packed_logps(model, row)
            moved = {k: to_device(v, device) if isinstance(v, torch.Tensor) else v for k, v in batch.stacked.items()}
            if prompt is not None and with_state:
                pairs = [pair for pair, _ in with_state]
                both = moved["input_ids"]
                for side in (0, len(batch)):
                    both = _marked(prompt, both, [(side + pair, 0) for pair in pairs])
                moved = {**moved, "input_ids": both}
            return self.pair_logps(model, moved, **options)

    def reference(self, policy: Any, ref_model: Any, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of both responses under the reference, [B] each, without gradient.

        They are cached in the batch, or computed: by `ref_model`, or without one by the policy as it was before
        training, which is the policy with its adapter off, or with TRL's frozen copy "ref" of it.
        """
        if batch.reference is not None:
            chosen, rejected = (to_device(logps, self.args.device) for logps in batch.reference)
            return chosen, rejected
        adapter = contextlib.nullcontext()
        if ref_model is None and is_peft_model(policy):
            unwrapped = self.accelerator.unwrap_model(policy)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with torch.no_grad(), adapter, self.accelerator.autocast():
            logps = self(policy if ref_model is None else ref_model, batch, for_users=False)
        return logps.chosen, logps.rejected

    def map(
        self,
        examples: Sequence[dict[str, Any]],
        collate: Callable[..., PairBatch],
        compute: Callable[[PairBatch], Sequence[torch.Tensor]],
        batch_size: int,
        *,
        rank: int = 0,
        processes: int = 1,
        advance: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """What `compute` returns of a batch, C tensors [B], for all examples in order: [C, N] in float64.

        Of several processes, each runs its share in equally many passes, and has 0 for the examples of the others.
        `advance` receives the number of examples of each pass.
        """
        bins = self.bins(examples, batch_size)
        values = torch.zeros(0, len(examples), dtype=torch.float64, device=self.args.device)
        for start in range(0, len(bins), processes):
            has_bin = start + rank < len(bins)
            indices = bins[start + rank] if has_bin else bins[0]
            columns = torch.stack([*compute(collate([examples[index] for index in indices]))])
            values = values if len(values) else values.new_zeros(len(columns), len(examples))
            if has_bin:
                values[:, indices] = columns.to(values.dtype)
            advance(len(indices))
        return values

    def identity(self, model: Any) -> tuple[str, ...]:
        """What a model's log-probs depend on besides weights and ids: types, attention, form of the batch, device."""
        return (
            str(next(model.parameters()).dtype),
            str(self.accelerator.mixed_precision),
            str(getattr(model.config, "_attn_implementation", "")),
            "shared_prefix_logps" if self.is_packed else getattr(self.pair_logps, "__name__", ""),
            self.args.device.type,
        )

    def token_counts(self, batch: PairBatch) -> torch.Tensor:
        """The work of each pair, [B, 5], on the host (metrics.token_counts)."""
        return torch.tensor(batch.row(self.args.device).counts) if self.is_packed else token_counts(batch.stacked)

    def enable_packing(self, models: Sequence[Any], dataset: Any, collate: Callable[..., PairBatch]) -> list[str]:
        """Switch to packed rows if all models support them and the first matches TRL's batch on two pairs.

        Returns notes for the user. Only the first call does something.
        """
        if not self._may_pack:
            return []
        self._may_pack = False
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else models[0].dtype
        reason, notes = enable_packing_if_exact(
            models,
            collate(_shortest_pairs(models[0], dataset)),
            collate(first_rows(dataset, self.args.per_device_train_batch_size)),
            dtype,
            self.args.device,
            autocast=lambda: self.accelerator.autocast(),
            fatal=is_out_of_memory,
        )
        self.is_packed = reason is None
        padded = [f"prompts are run twice and batches padded, as in TRL: the model cannot share, {reason}"]
        return notes if self.is_packed else notes + padded

    def split(self, batch: PairBatch) -> list[PairBatch]:
        """The batches of the forward passes of a micro-batch: at most `pack_tokens` tokens each."""
        if not self.is_packed or self.args.pack_tokens is None:
            return [batch]
        return [batch.select(indices) for indices in self.bins(batch.examples, len(batch))]

    def bins(self, pairs: Sequence[dict[str, Any]], batch_size: int) -> list[list[int]]:
        """The indices of the pairs of each forward pass, at most `batch_size` of them or `pack_tokens` tokens."""
        lengths = [packed_length(pair) for pair in pairs]
        if self.is_packed and self.args.pack_tokens is not None:
            return pack_bins(lengths, self.args.pack_tokens)
        by_length = sorted(range(len(pairs)), key=lengths.__getitem__)  # similar lengths need little padding
        return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def _marked(prompt: SoftPrompt, ids: torch.Tensor, starts: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Token ids [N, L] with the opening of some prompts marked: user number i of the states begins at `starts[i]`."""
    ids = ids.clone()
    for user, (row, start) in enumerate(starts):
        marks = torch.tensor(prompt.marks(user), device=ids.device)
        ids[row, start : start + len(marks)] = marks
    return ids


def _shortest_pairs(model: Any, dataset: Any) -> list[dict[str, Any]]:
    """Two short pairs for the comparison of packed rows with TRL's batch.

    They are cropped around the point where their answers diverge, unless the model has sliding windows: then the two
    longest of the first rows, uncropped, so that the windows matter.
    """
    pairs = first_rows(dataset, 64)
    if getattr(model.config.get_text_config(), "sliding_window", None):
        return sorted(pairs, key=packed_length, reverse=True)[:2]
    return [crop_around_divergence(pair) for pair in sorted(pairs, key=packed_length)[:2]]
