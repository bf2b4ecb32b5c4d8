"""What APOTrainer asks models for: log-probs of both responses of pairs, in packed rows where those are exact.

Of the policy, of the reference (from its cache, or on the way), of mismatched pairs, of answers that are held out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from apo.data.tokenize import first_rows
from apo.models.tensor_cache import hash_model
from apo.monitoring.failures import is_out_of_memory, stop_on_out_of_memory
from apo.packing.async_copy import to_device
from apo.packing.batch import DUMMY, IDS, PAIR_WEIGHT, Batch, TurnCollator, WeightedCollator, rotate_responses
from apo.packing.layout import crop_around_divergence, pack_bins, packed_length
from apo.packing.packed_model import enable_packing_if_exact, shared_prefix_logps
from apo.training.reference import Advance, add_reference_logps
from clair.core.errors import UserError
from clair.core.progress import progress

PRECOMPUTES_NO_STREAM = (
    "precompute_ref_log_probs=True is not supported with IterableDataset, whose rows are not known before; "
    "leave it out, or give a datasets.Dataset"
)


class LogprobTrainer(DPOTrainer):
    """DPOTrainer's asking half; `APOTrainer` sets its attributes and learns."""

    @property
    def data_collator(self) -> Any:
        """The collator of the batches. Whichever is set, it leaves out turns that are not the model's."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collate: Any) -> None:
        ready = isinstance(collate, TurnCollator | WeightedCollator)
        self._data_collator = collate if ready else TurnCollator(collate)

    @property
    def is_packed(self) -> bool:
        """Whether pairs are asked for in packed rows, without padding, each prompt once."""
        return self.pair_logps is shared_prefix_logps

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """The precision of a training step, without gradient and with the policy in eval mode: for every question to
        the policy or the reference outside of one, so that both answer alike while they are one model.

        accelerate puts autocast around the model's own `forward` only when training starts, and transformers'
        `compute_loss_context_manager` does nothing. (Under DeepSpeed the weights are in the type of training already.)
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            self.model.train(training)

    def _enable_packing(self) -> None:
        """Ask in packed rows from now on, if the model can be and agrees with TRL's batch on two pairs."""
        if self.is_deepspeed_enabled:
            self.model.to(self.args.device)  # transformers leaves that to DeepSpeed, and the model is asked before
        if not self._may_pack:
            return
        self._may_pack = False
        # A reference of its own may be DeepSpeed's already; what is asked is the model inside.
        asked = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        batch = first_rows(self.train_dataset, self.args.per_device_train_batch_size)
        first = self._prepare_inputs(self.data_collator(batch))
        short = self._prepare_inputs(self.data_collator(self._shortest_pairs()))
        computed = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        told = {"autocast": self.accelerator.autocast, "fatal": is_out_of_memory}
        reason, notes = enable_packing_if_exact(asked, short, first, computed, **told)
        self.notes += notes
        if reason is None:
            self.pair_logps = shared_prefix_logps
        else:
            self.notes.append(f"prompts are run twice and batches padded, as in TRL: the model cannot share, {reason}")

    def _shortest_pairs(self) -> list[dict[str, Any]]:
        """Two pairs to compare packed rows with TRL's batch on: no longer than they must be.

        Long ones are cut to what lies around the place where their answers part, unless the model has windows.
        """
        pairs = first_rows(self.train_dataset, 64)
        if getattr(self.model.config.get_text_config(), "sliding_window", None):
            return sorted(pairs, key=packed_length, reverse=True)[:2]
        return [crop_around_divergence(pair) for pair in sorted(pairs, key=packed_length)[:2]]

    def _prepare_input(self, data: Any) -> Any:
        """On the device, in its own type: under DeepSpeed transformers rounds log-probs to that of the weights.

        Ids that are packed first stay here; weights there say where the row goes.
        """
        if isinstance(data, Mapping) and "input_ids" in data and self.is_packed:
            here = {key: data[key] for key in IDS}
            there = {key: value for key, value in data.items() if key not in IDS}
            ones = torch.ones(len(data["input_ids"]) // 2, device=self.args.device)
            return here | super()._prepare_input({PAIR_WEIGHT: ones} | there)
        return to_device(data, self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    @property
    def _max_tokens(self) -> int | None:
        """Tokens that a forward pass may have, where anything bounds them."""
        return self.args.pack_tokens if self.is_packed else None

    def _passes(self, pairs: Sequence[dict[str, Any]], batch_size: int) -> list[list[int]]:
        """Which pairs are asked for together, where there is no gradient: their places."""
        sizes = [packed_length(pair) for pair in pairs]
        if self._max_tokens is not None:
            return pack_bins(sizes, self._max_tokens)
        alike = sorted(range(len(pairs)), key=sizes.__getitem__)  # like lengths, little padding
        return [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]

    def _over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor, "sum")

    def response_logps(self, examples: Sequence[dict[str, Any]]) -> list[float]:
        """Log-prob of the chosen response of each example (id columns, no rejected one) by the model as it is.

        Shared out over the processes, each of which has to ask, and gets all. Draws no random number.
        """
        bins = self._passes(examples, self.args.per_device_eval_batch_size)
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        collate = getattr(self.data_collator, "collate", self.data_collator)
        found = torch.zeros(len(examples), dtype=torch.float64, device=self.accelerator.device)
        with self.evaluation_mode():
            for start in range(0, len(bins), count):
                mine = bins[start + rank] if start + rank < len(bins) else bins[0]  # all run equally many passes
                batch = self._prepare_inputs(collate([examples[place] for place in mine]))
                logps = self.pair_logps(self.model, batch).chosen
                if start + rank < len(bins):
                    found[mine] = logps.to(found.dtype)
        return self._over_processes(found).tolist()

    # The reference

    @property
    def _reference(self) -> torch.nn.Module:
        return self.model if self.ref_model is None else self.ref_model

    def _reference_logps(self, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self._reference, inputs)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of both responses under the reference, [B] each, without gradient."""
        adapter = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with torch.no_grad(), adapter, self.accelerator.autocast():
            logps = self.pair_logps(model, inputs)
        return logps.chosen, logps.rejected

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the reference's log-probs as two columns, from the cache where it has them (reference.py)."""
        if not self.objective.needs_reference:
            return dataset
        if isinstance(dataset, IterableDataset):
            raise UserError(PRECOMPUTES_NO_STREAM)
        self._enable_packing()
        model = self._reference
        model.to(self.args.device)

        def compute(pairs: Sequence[dict[str, Any]], advance: Advance) -> tuple[torch.Tensor, torch.Tensor]:
            found, bins = [], self._passes(pairs, batch_size)
            for places in bins:
                batch = self._prepare_inputs(self.data_collator([pairs[place] for place in places]))
                self.current_batch = batch
                found.append(torch.stack(self.compute_ref_log_probs(model, batch)).double())
                advance(len(places))
            order = [place for places in bins for place in places]
            return tuple(torch.cat(found, 1)[:, torch.tensor(order).argsort()])

        folder = Path(self.args.reference_cache) if self.args.reference_cache else None
        identity = (self._reference_hash(model), *self._reference_numerics(model)) if folder else ()
        with stop_on_out_of_memory(self, "the reference's log-probs"):
            dataset, computed = add_reference_logps(
                dataset, identity, compute, folder, self.notes.append,
                rank=self.args.process_index, processes=self.args.world_size,
                exchange=lambda mine: gather_object([mine]),
                watched=lambda missing: progress(
                    f"reference log-probs, {name}", missing, shown=self.args.process_index == 0
                ),
            )  # fmt: skip
        self.reference_computed[name] = computed
        return dataset

    def _reference_hash(self, model: torch.nn.Module) -> str:
        if self._weights_hash is None:
            self._weights_hash = hash_model(model)
        return self._weights_hash

    def _reference_numerics(self, model: torch.nn.Module) -> tuple[str, ...]:
        """What else than weights and ids the log-probs depend on: numeric types, attention, device, how batches lie."""
        attention = getattr(model.config, "_attn_implementation", "")
        way = getattr(self.pair_logps, "__name__", "")
        mixed = self.accelerator.mixed_precision
        return str(next(model.parameters()).dtype), str(mixed), str(attention), way, self.args.device.type

    def _divergence(self, batches: Sequence[Batch]) -> torch.Tensor:
        """KTO's kl: the mean log-ratio, in nats, of each prompt with the next pair's responses, summed over their
        tokens and as the mean over them, [2]. 0 for one pair. Every response counts alike, whatever its pair weighs.

        The rotation runs over the whole optimizer step of all processes, so that it depends neither on the size of a
        micro-batch nor on how many processes there are.
        """
        total = torch.zeros(3, device=self.accelerator.device)
        weighted = isinstance(self.data_collator, WeightedCollator)
        collate = self.data_collator.collate if weighted else self.data_collator
        for batch in rotate_responses(batches, collate, gather_object, self.accelerator.process_index):
            batch = self._prepare_inputs(batch)
            with self.evaluation_mode():
                policy, reference = self.pair_logps(self.model, batch), self._reference_logps(batch)
            ratios = torch.cat([policy.chosen - reference[0], policy.rejected - reference[1]]).float()
            lengths = torch.cat([policy.chosen_len, policy.rejected_len])
            if DUMMY not in batch:  # which is run all the same: sharded processes run equally many
                total += torch.stack([ratios.sum(), (ratios / lengths.clamp(min=1)).sum(), (lengths > 0).sum()])
        total = self._over_processes(total)
        return total[:2] / total[2].clamp(min=1)
