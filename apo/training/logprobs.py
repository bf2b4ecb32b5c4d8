"""The log-probs of a trainer's models: policy, reference and held-out answers, in packed rows where those are exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import use_adapter

from apo.data.tokenize import first_rows
from apo.losses.mixture import Mixture
from apo.models.tensor_cache import hash_model
from apo.monitoring.failures import is_out_of_memory, stop_on_out_of_memory
from apo.monitoring.throughput import Meter
from apo.packing.async_copy import to_device
from apo.packing.batch import DUMMY, IDS, PAIR_WEIGHT, Batch, TurnCollator, WeightedCollator, rotate_responses
from apo.packing.layout import crop_around_divergence, pack_bins, packed_length
from apo.packing.logps import PairLogpsFunction
from apo.packing.packed_model import enable_packing_if_exact, shared_prefix_logps
from apo.training.reference import NO_CACHE_FOR_STREAMS, Advance, add_reference_logps
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError
from clair.core.progress import progress


class LogprobTrainer(DPOTrainer):
    """The forward half of the trainer: every log-prob of policy and reference. `APOTrainer` adds loss and training.

    `APOTrainer.__init__` sets the attributes annotated here.
    """

    args: APOConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # wider in TRL
    processing_class: PreTrainedTokenizerBase  # pyright: ignore[reportIncompatibleVariableOverride]  # wider in TRL
    model: Any
    ref_model: Any

    objective: Mixture
    meter: Meter
    pair_logps: PairLogpsFunction
    notes: list[str]
    current_batch: Batch | None
    reference_computed: dict[str, int]
    train_dataset: Any
    _may_pack: bool
    """True until `_enable_packing` has tried."""
    _weights_hash: str | None

    @property
    def data_collator(self) -> Any:
        """The collator of the batches. Any collator that is set also leaves out turns the model does not write."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collate: Any) -> None:
        wrapped = isinstance(collate, TurnCollator | WeightedCollator)
        self._data_collator = collate if wrapped else TurnCollator(collate)

    @property
    def is_packed(self) -> bool:
        """True if log-probs are computed in packed rows: without padding, each prompt once."""
        return self.pair_logps is shared_prefix_logps

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """No gradient, the policy in eval mode, and the precision of a training step.

        For every forward of policy or reference outside of a training step, so that both agree while they are the same
        model. accelerate puts autocast around the model's own `forward` only when training starts, and transformers'
        `compute_loss_context_manager` does nothing. (Under DeepSpeed the weights already have the type of training.)
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            self.model.train(training)

    @contextlib.contextmanager
    def _neftune(self) -> Iterator[None]:
        """NEFTune's noise at TRL's scale, by the length of the longest sequence of the micro-batch.

        transformers would scale it by the length of the packed row.
        """
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None
        if alpha is None:
            yield
            return

        def add_noise(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
            if not module.training:
                return output
            assert self.current_batch is not None  # set by compute_loss
            scale = alpha / (self.current_batch["input_ids"].shape[1] * output.shape[-1]) ** 0.5
            return output + torch.empty_like(output).uniform_(-scale, scale)

        embeddings = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        hook = embeddings.register_forward_hook(add_noise)
        try:
            yield
        finally:
            hook.remove()
            self.neftune_noise_alpha = alpha

    def _enable_packing(self) -> None:
        """Switch to packed rows if the model supports them and they match TRL's batch on two pairs."""
        if self.is_deepspeed_enabled:
            self.model.to(self.args.device)  # transformers leaves this to DeepSpeed, which acts only in training
        if not self._may_pack:
            return
        self._may_pack = False
        # DeepSpeed may have wrapped a separate reference already; packing patches the model inside.
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        examples = first_rows(self.train_dataset, self.args.per_device_train_batch_size)
        batch = self._prepare_inputs(self.data_collator(examples))
        pairs = self._prepare_inputs(self.data_collator(self._shortest_pairs()))
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        reason, notes = enable_packing_if_exact(
            models, pairs, batch, dtype, autocast=lambda: self.accelerator.autocast(), fatal=is_out_of_memory
        )
        self.notes += notes
        if reason is None:
            self.pair_logps = shared_prefix_logps
        else:
            self.notes.append(f"prompts are run twice and batches padded, as in TRL: the model cannot share, {reason}")

    def _shortest_pairs(self) -> list[dict[str, Any]]:
        """Two short pairs for the comparison of packed rows with TRL's batch.

        They are cropped around the point where their answers diverge, unless the model has sliding windows: then the
        two longest of the first rows, uncropped, so that the windows matter.
        """
        pairs = first_rows(self.train_dataset, 64)
        if getattr(self.model.config.get_text_config(), "sliding_window", None):
            return sorted(pairs, key=packed_length, reverse=True)[:2]
        return [crop_around_divergence(pair) for pair in sorted(pairs, key=packed_length)[:2]]

    def _prepare_input(self, data: Any) -> Any:
        """Move data to the device, in its own type: under DeepSpeed transformers rounds log-probs to that of weights.

        Ids to be packed stay on the host; the weights on the device tell where the packed row goes.
        """
        if isinstance(data, Mapping) and "input_ids" in data and self.is_packed:
            on_host = {key: data[key] for key in IDS}
            on_device = {key: value for key, value in data.items() if key not in IDS}
            ones = torch.ones(len(data["input_ids"]) // 2, device=self.args.device)
            moved = super()._prepare_input({PAIR_WEIGHT: ones, **on_device})
            assert isinstance(moved, dict)
            return {**on_host, **moved}
        return to_device(data, self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    @property
    def _max_tokens(self) -> int | None:
        """The limit on the tokens of a forward pass, or None."""
        return self.args.pack_tokens if self.is_packed else None

    def _forward_bins(self, pairs: Sequence[dict[str, Any]], batch_size: int) -> list[list[int]]:
        """The indices of the pairs of each forward pass, without gradient."""
        lengths = [packed_length(pair) for pair in pairs]
        if self._max_tokens is not None:
            return pack_bins(lengths, self._max_tokens)
        by_length = sorted(range(len(pairs)), key=lengths.__getitem__)  # similar lengths need little padding
        return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        total = self.accelerator.reduce(tensor, "sum")
        assert isinstance(total, torch.Tensor)
        return total

    def response_logps(self, examples: Sequence[dict[str, Any]]) -> list[float]:
        """Log-prob of the chosen response of each example (id columns, no rejected one) by the current model.

        Collective: every process calls it with the same examples, computes a share and gets all results. Draws no
        random number.
        """
        bins = self._forward_bins(examples, self.args.per_device_eval_batch_size)
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        collate = getattr(self.data_collator, "collate", self.data_collator)
        logps = torch.zeros(len(examples), dtype=torch.float64, device=self.accelerator.device)
        with self.evaluation_mode():
            for start in range(0, len(bins), count):
                has_bin = start + rank < len(bins)
                indices = bins[start + rank] if has_bin else bins[0]  # all processes run equally many passes
                batch = self._prepare_inputs(collate([examples[index] for index in indices]))
                chosen = self.pair_logps(self.model, batch).chosen
                if has_bin:
                    logps[indices] = chosen.to(logps.dtype)
        return self._sum_over_processes(logps).tolist()

    # The reference

    @property
    def _reference(self) -> Any:
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
        """`dataset` with the reference's log-probs as two columns, from the cache if it has them (reference.py)."""
        if not self.objective.needs_reference:
            return dataset
        if isinstance(dataset, IterableDataset):
            raise UserError(NO_CACHE_FOR_STREAMS)
        self._enable_packing()
        model = self._reference
        model.to(self.args.device)

        def compute(pairs: Sequence[dict[str, Any]], advance: Advance) -> tuple[torch.Tensor, torch.Tensor]:
            logps, bins = [], self._forward_bins(pairs, batch_size)
            for indices in bins:
                batch = self._prepare_inputs(self.data_collator([pairs[index] for index in indices]))
                self.current_batch = batch
                logps.append(torch.stack(self.compute_ref_log_probs(model, batch)).double())
                advance(len(indices))
            order = torch.tensor([index for indices in bins for index in indices])
            chosen, rejected = torch.cat(logps, 1)[:, order.argsort()]
            return chosen, rejected

        folder = Path(self.args.reference_cache) if self.args.reference_cache else None
        identity = (self._reference_hash(model), *self._reference_numerics(model)) if folder else ()
        with stop_on_out_of_memory(self, "the reference's log-probs"):
            dataset, computed = add_reference_logps(
                dataset, identity, compute, folder, self.notes.append,
                rank=self.args.process_index, processes=self.args.world_size,
                gather=lambda value: gather_object([value]),
                show_progress=lambda total: progress(
                    f"reference log-probs, {name}", total, shown=self.args.process_index == 0
                ),
            )  # fmt: skip
        self.reference_computed[name] = computed
        return dataset

    def _reference_hash(self, model: torch.nn.Module) -> str:
        if self._weights_hash is None:
            self._weights_hash = hash_model(model)
        return self._weights_hash

    def _reference_numerics(self, model: Any) -> tuple[str, ...]:
        """What log-probs depend on besides weights and ids: numeric types, attention, batch form and device."""
        attention = getattr(model.config, "_attn_implementation", "")
        batch_form = getattr(self.pair_logps, "__name__", "")
        mixed = self.accelerator.mixed_precision
        return str(next(model.parameters()).dtype), str(mixed), str(attention), batch_form, self.args.device.type

    def _divergence(self, batches: Sequence[Batch]) -> torch.Tensor:
        """KTO's kl: the mean log-ratio, in nats, of each prompt with the next pair's responses, [2]: summed over their
        tokens, and as the mean over them. 0 for one pair. Every response counts equally, whatever its pair weighs.

        The rotation runs over the whole optimizer step of all processes, so that it depends neither on the size of a
        micro-batch nor on the number of processes.
        """
        totals = torch.zeros(3, device=self.accelerator.device)
        weighted = isinstance(self.data_collator, WeightedCollator)
        collate = self.data_collator.collate if weighted else self.data_collator
        for rotated in rotate_responses(batches, collate, gather_object, self.accelerator.process_index):
            batch = self._prepare_inputs(dict(rotated))
            with self.evaluation_mode():
                policy, reference = self.pair_logps(self.model, batch), self._reference_logps(batch)
            ratios = torch.cat([policy.chosen - reference[0], policy.rejected - reference[1]]).float()
            lengths = torch.cat([policy.chosen_len, policy.rejected_len])
            if DUMMY not in batch:  # run nevertheless: sharded processes run equally many passes
                totals += torch.stack([ratios.sum(), (ratios / lengths.clamp(min=1)).sum(), (lengths > 0).sum()])
        totals = self._sum_over_processes(totals)
        return totals[:2] / totals[2].clamp(min=1)
