"""APOTrainer: TRL's DPOTrainer with `compute_loss` overridden, independent of the objective.

Two plug points, both plain functions: the objective (objectives.py) and `pair_logps(model, stacked)` (logps.py).
Every pair of an optimizer step has the same weight, whatever micro-batches and processes the step is divided into.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import set_seed
from trl.trainer.utils import add_fused_lm_head

from apo.data.tokenize import MASK_COLUMNS
from apo.distributed.deepspeed import accumulate_gradients, cast_for_deepspeed, register_zero3, unregister_zero3
from apo.distributed.launch import sum_over_processes
from apo.losses.divergence import estimate_divergence
from apo.losses.mixture import resolve_mixture
from apo.models.decomposed_lora import decompose, is_decomposed
from apo.models.tensor_cache import hash_model
from apo.monitoring.failures import NonFiniteLossCheck, check_gradient, stop_on_out_of_memory
from apo.monitoring.metrics import COLUMNS, ROUNDING, aggregate_metrics, per_pair_metrics
from apo.monitoring.throughput import Meter, compute_scale
from apo.packing.async_copy import to_device
from apo.packing.batch import PairBatch
from apo.packing.logps import PairLogpsFunction
from apo.packing.neftune import neftune_noise
from apo.training.arguments import (
    check_arguments,
    default_output_dir,
    ineffective_options,
    load_named_model,
    resolve_reference,
    rounding_notes,
)
from apo.training.checkpointing import CheckpointTrainer
from apo.training.collator import PairCollator
from apo.training.logprobs import LogprobComputer
from apo.training.optimizer_check import check_optimizer, count_steps
from apo.training.reference import NO_CACHE_FOR_STREAMS, Advance, add_reference_logps, without_weight_hash
from apo.training.rows import prepare_rows
from apo.training.soft_prompt import add_soft_prompt
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError
from clair.core.progress import progress

_LOG = logging.getLogger(__name__)
SMALLEST_WEIGHT = 1e-30
"""Lower bound of a step's divisor, so that a step whose pairs all weigh 0 has loss 0 and not NaN."""


class APOTrainer(CheckpointTrainer):
    """DPOTrainer for any objective on pairs.

    `model` is a model, a folder or a hub name. A name is loaded with `args.model_init_kwargs`, by default in float32;
    an adapter is loaded on its base. The reference is the initial `model`: for full fine-tuning a frozen copy, for a
    new LoRA adapter the model with the adapter off, for an existing adapter, or PiSSA's, TRL's frozen copy "ref" of it.
    Datasets may be streams (IterableDataset), tokenized row by row.

    `notes` are messages to the user about data, model and options; `log` receives each, by default as a warning of
    Python's logging. `dropped` counts the pairs left out of each dataset, by reason; `reference_computed` counts the
    pairs whose reference log-probs were not in the cache. Assign `verified_checkpoint` if the files of a checkpoint
    have just been hashed: `train` resumes from it without reading them again. `logps` computes all log-probs.
    """

    logps: LogprobComputer
    ref_model: Any
    train_dataset: Any

    # compute_loss divides by the pairs of the whole accumulation window, so the loop must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: APOConfig | None = None,
        pair_logps: PairLogpsFunction | None = None,
        log: Callable[[str], None] = _LOG.warning,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = APOConfig(default_output_dir(model))
        if not isinstance(args, APOConfig):
            raise UserError(f"args is a {type(args).__name__}; APOTrainer takes an APOConfig")
        if kwargs.get("compute_metrics") is not None:
            raise UserError("compute_metrics would be ignored: the batch's logits are never built; leave it out")
        self.objective = resolve_mixture(args.objective)
        self._pair_logps = pair_logps
        packed = pair_logps is None and args.shared_prefix
        check_arguments(args, self.objective, kwargs.get("train_dataset"), kwargs.get("eval_dataset"), packed=packed)
        is_named = isinstance(model, str)
        if is_named:
            model = load_named_model(model, args, kwargs)
        if isinstance(model, torch.nn.Module):
            cast_for_deepspeed(model, args)
        self._is_decomposed = is_decomposed(kwargs.get("peft_config"))
        if self._is_decomposed:
            set_seed(args.seed)
            model = decompose(model, kwargs.pop("peft_config"))
        # The tags of TRL's trainer for such rows, and this package's.
        self._tag_names = ["trl", "kto" if self.objective.paired_only_reason is None else "dpo", "apo"]
        self.dropped: dict[str, dict[str, int]] = {}
        self.reference_computed: dict[str, int] = {}
        self._micro_batch: PairBatch | None = None
        self.notes: list[str] = []
        self._generation_config = getattr(model, "generation_config", None)
        self._kl: torch.Tensor | tuple[float, float] = (0.0, 0.0)
        precompute, init_kwargs = args.precompute_ref_log_probs, args.model_init_kwargs
        has_adapter = bool(kwargs.get("peft_config") is not None or is_peft_model(model))
        ref_model, is_loaded_by_name = resolve_reference(model, ref_model, args, self.objective, has_adapter)
        # The one switch that keeps TRL from loading a second model; `_precompute_ref_logps` then does nothing.
        args.precompute_ref_log_probs = precompute or not self.objective.needs_reference
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        if is_named and not is_loaded_by_name:
            args.model_init_kwargs = None  # TRL would warn that they are ignored: the model is loaded already
        # Other models than transformers' and PEFT's work as well.
        with without_weight_hash():
            super().__init__(model=cast(Any, model), ref_model=ref_model, args=args, **kwargs)
        args.model_init_kwargs = init_kwargs
        self.is_fsdp_enabled = self._uses_fsdp
        if getattr(model, "is_loaded_in_4bit", False):  # TRL casts the adapter to bfloat16, which drops small steps
            for weight in self.model.parameters():
                weight.data = weight.data.float() if weight.requires_grad else weight.data
        args.precompute_ref_log_probs = self.precompute_ref_logps = precompute
        self._set_signature_columns_if_needed()
        added = [*MASK_COLUMNS, *(column for column in (args.weights, args.soft_prompt) if column is not None)]
        self._signature_columns = [*dict.fromkeys([*(self._signature_columns or []), *added])]
        self._saved_use_cache = self.model.config.use_cache if use_cache is None else use_cache
        # TRL's own head also computes entropies and mean logits for its logs; here only the log-probs are needed.
        add_fused_lm_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self._enable_packing()
        self.logps.soft_prompt = self.soft_prompt = add_soft_prompt(
            args, self.model, self.processing_class, self.train_dataset, self.eval_dataset
        )
        self.meter = Meter(self.accelerator, compute_scale(self.model, self.args.device))
        self._losses = NonFiniteLossCheck(self.args.device)
        self.notes += [
            *ineffective_options(args, packed=self.is_packed),
            *(() if self.is_deepspeed_enabled else rounding_notes(self.model, args.learning_rate)),  # it keeps float32
        ]
        for note in dict.fromkeys(self.notes) if args.process_index == 0 else ():
            log(note)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP disabled until the trainer is built and ZeRO-3 until training starts.

        Until then the model is whole and computes the reference's log-probs itself; TRL would load a second one.
        """
        super().create_accelerator_and_postprocess()
        self.logps = LogprobComputer(self.args, self.accelerator, self._pair_logps)
        self._uses_fsdp, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        self._deepspeed_config = unregister_zero3() if self.is_deepspeed_enabled else None

    # The data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        tokenized = prepare_rows(dataset, processing_class, self._generation_config, args, dataset_name)
        self.dropped[dataset_name] = tokenized.dropped
        self.notes += tokenized.notes
        return tokenized.dataset

    @property
    def data_collator(self) -> PairCollator:
        """The collator of the batches, around TRL's or the one that is set."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collate: Any) -> None:
        wrapped = isinstance(collate, PairCollator)
        self._data_collator = collate if wrapped else PairCollator(collate, self.args.weights, self.args.soft_prompt)

    def get_batch_samples(
        self, epoch_iterator: Iterator[PairBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PairBatch], torch.Tensor | int | None]:
        """The micro-batches of an optimizer step, and the total weight of its pairs over all processes."""
        self.meter.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            batches[-1] = self._drop_repeats(batches[-1], self._train_batch_size)
        if self.objective.needs_divergence:
            self._kl = self._divergence(batches)
        weight = sum((batch.weights.sum() for batch in batches), torch.zeros(()))
        return batches, sum_over_processes(self.accelerator, to_device(weight, device))

    def _drop_repeats(self, batch: PairBatch, size: int) -> PairBatch:
        """A batch without the pairs that the dataloader repeats at its end to give all processes equally many.

        A batch of repeated pairs only becomes a dummy. `size` is the number of pairs in a full batch.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or self.args.dataloader_drop_last or not state.end_of_dataloader:
            return batch
        assert state.active_dataloader is not None  # a batch has just come from it
        remainder = len(state.active_dataloader.dataset) % (size * processes)
        count = min(size, max(0, remainder - self.accelerator.process_index * size)) if remainder else size
        if count == size:
            return batch
        return batch.select(range(count or 1), dummy=not count)

    # Log-probs of policy and reference

    @property
    def is_packed(self) -> bool:
        """True if log-probs are computed in packed rows: without padding, each prompt once."""
        return self.logps.is_packed

    @property
    def current_batch(self) -> PairBatch | None:
        """The batch of the latest forward pass."""
        return self.logps.current_batch

    def _enable_packing(self) -> None:
        if self.is_deepspeed_enabled:
            self.model.to(self.args.device)  # transformers leaves this to DeepSpeed, which acts only in training
        # DeepSpeed may have wrapped a separate reference already; packing patches the model inside.
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        self.notes += self.logps.enable_packing(models, self.train_dataset, self.data_collator)

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

    def response_logps(self, examples: Sequence[dict[str, Any]]) -> list[float]:
        """Log-prob of the chosen response of each example (id columns, no rejected one) by the current model.

        Collective: every process calls it with the same examples, computes a share and gets all results. Draws no
        random number.
        """
        return self.map_examples(examples, lambda batch: [self.logps(self.model, batch).chosen])[0].tolist()

    def held_out_logratios(self) -> list[tuple[float, float, float, float]]:
        """For each held-out pair: the log-ratios of both responses in nats, the rounding of their difference, the loss.

        For an objective without a reference, the mean log-probs of a token in their place. Collective, and without
        random numbers.
        """

        def compute(batch: PairBatch) -> Sequence[torch.Tensor]:
            policy = self.logps(self.model, batch)
            rounding = ROUNDING * (policy.chosen_len + policy.rejected_len)
            reference = self.reference_logps(batch) if self.objective.needs_reference else None
            losses = self.objective.losses(policy, reference, beta=self.beta, kl=self._kl)
            if reference is None:
                return policy.chosen / policy.chosen_len, policy.rejected / policy.rejected_len, 0 * rounding, losses
            return policy.chosen - reference[0], policy.rejected - reference[1], rounding, losses

        examples = [dict(row) for row in cast(Dataset, self.eval_dataset)]
        return [(*row,) for row in self.map_examples(examples, compute).T.tolist()]

    def map_examples(
        self, examples: Sequence[dict[str, Any]], compute: Callable[[PairBatch], Sequence[torch.Tensor]]
    ) -> torch.Tensor:
        """What `compute` returns of a batch, C tensors [B], for all examples in order: [C, N] in float64.

        Collective, as `response_logps` is.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = self.args.per_device_eval_batch_size
        with self.evaluation_mode():
            share = self.logps.map(examples, self.data_collator, compute, size, rank=rank, processes=processes)
        return sum_over_processes(self.accelerator, share)

    @property
    def _reference(self) -> Any:
        return self.model if self.ref_model is None else self.ref_model

    def reference_logps(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of both responses under the reference, [B] each, without gradient: cached, or computed."""
        return self.logps.reference(self.model, self.ref_model, batch)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the reference's log-probs as two columns, from the cache if it has them (reference.py)."""
        if not self.objective.needs_reference:
            return dataset
        if isinstance(dataset, IterableDataset):
            raise UserError(NO_CACHE_FOR_STREAMS)
        self._enable_packing()
        self._reference.to(self.args.device)

        def compute(pairs: Sequence[dict[str, Any]], advance: Advance) -> torch.Tensor:
            return self.logps.map(pairs, self.data_collator, self.reference_logps, batch_size, advance=advance)

        folder = Path(self.args.reference_cache) if self.args.reference_cache else None
        with stop_on_out_of_memory(self, "the reference's log-probs"):
            dataset, self.reference_computed[name] = add_reference_logps(
                dataset,
                (self._reference_hash, *self.logps.identity(self._reference)) if folder else (),
                compute,
                folder,
                self.notes.append,
                rank=self.args.process_index,
                processes=self.args.world_size,
                gather=lambda value: gather_object([value]),
                show_progress=lambda total: progress(
                    f"reference log-probs, {name}", total, shown=self.args.process_index == 0
                ),
            )
        return dataset

    @cached_property
    def _reference_hash(self) -> str:
        return hash_model(self._reference)

    def _divergence(self, batches: Sequence[PairBatch]) -> torch.Tensor:
        with self.evaluation_mode():
            return estimate_divergence(
                batches, lambda batch: (self.logps(self.model, batch), self.reference_logps(batch)), self.accelerator
            )

    # The loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's training. Raises `failures.TrainingStopped` when memory runs out or a loss is not finite.

        With `resume_from_checkpoint=True` it resumes from the newest whole checkpoint of `output_dir`. Raises UserError
        for a given checkpoint that is damaged, and for an optimizer or a schedule that cannot be set up.
        """
        resume_from_checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        if self.optimizer is None:
            check_optimizer(self.args, count_steps(self.args, self.train_dataset), "")
        register_zero3(self._deepspeed_config)
        with (
            stop_on_out_of_memory(self, "training"),
            contextlib.nullcontext()
            if self.neftune_noise_alpha is None
            else neftune_noise(self, lambda: cast(Any, self._micro_batch)["input_ids"].shape[1]),
        ):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch, in passes of at most `pack_tokens`."""
        self._micro_batch = inputs
        *passes, last = self._split_into_passes(inputs)
        loss = torch.zeros(())
        for batch in passes:
            with self._accumulate_only(model):
                loss = loss + super().training_step(model, batch, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def _accumulate_only(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """The context of all passes of a micro-batch but the last: gradients accumulate and are not synchronized."""
        if self.is_deepspeed_enabled:
            return accumulate_gradients(self.accelerator)
        # DDP: processes may have different numbers of passes, and synchronize at the last. FSDP accumulates shards.
        return contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    def _split_into_passes(self, batch: PairBatch) -> list[Any]:
        passes = self.logps.split(batch)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Each pass gathers weights or reduces gradients of all processes, so all run equally many.
            count = self.accelerator.gather(torch.tensor([len(passes)], device=self.args.device))
            assert isinstance(count, torch.Tensor)
            passes += [batch.select([0], dummy=True)] * (int(count.max()) - len(passes))
        return passes

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The weighted mean loss over the pairs of the optimizer step: here sum(w * loss) / `num_items_in_batch`.

        `num_items_in_batch` is sum(w) over the whole step: its number of pairs if all weigh 1. A step whose pairs all
        weigh 0 has loss 0.
        """
        mode = "train" if model.training else "eval"
        if mode == "eval":
            inputs = self._drop_repeats(inputs, self.args.eval_batch_size)
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        # The precision of a training step, also before training: accelerate puts it around the model's `forward` there.
        with self.accelerator.autocast() if mode == "eval" else contextlib.nullcontext():
            policy = self.logps(model, inputs, **options)
        reference = self.reference_logps(inputs) if self.objective.needs_reference else None
        if mode == "eval" and self.objective.needs_divergence:
            self._kl = self._divergence([inputs])
        losses = self.objective.losses(policy, reference, beta=self.beta, kl=self._kl)
        weights = to_device(inputs.weights, losses.device)
        if mode == "train":
            self._losses.add(self, losses, inputs.examples)
        if policy.aux_loss is not None:
            losses = losses + self.router_aux_loss_coef * policy.aux_loss
        counts = to_device(self.logps.token_counts(inputs), losses.device)
        rows = per_pair_metrics(losses, policy, reference, weights, self._kl, counts)
        self.meter.add(mode, rows[:0] if inputs.dummy else rows, None if inputs.dummy else policy.aux_loss)
        divisor = weights.sum() if num_items_in_batch is None else num_items_in_batch
        total = (weights * losses).sum()
        # Gradients are averaged over processes afterwards, and the divisor is the weight of the pairs of all of them.
        processes = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return total * processes / torch.as_tensor(divisor, device=total.device).clamp(min=SMALLEST_WEIGHT)

    # The logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log (metrics.py), gathered at logging steps only.

        Also what TRL logs: `num_tokens` trained on since the start, both sequences of a pair with their prompts, and
        the `aux_loss` of a mixture of experts, its mean over the batches since the last log.
        """
        times = (key for key in logs if key.endswith("_runtime") and key != "train_runtime")
        prefix = next(times, "").removesuffix("runtime")
        mode = "eval" if prefix else "train"
        if self.meter.has(mode) and (prefix or "loss" in logs):
            if mode == "train":
                self._losses.flush(self)
                check_gradient(self, logs.get("grad_norm"))
            rows = self.meter.gather(mode)
            metrics = aggregate_metrics(rows, self.objective, self.beta) | self.meter.mean_aux_loss(mode)
            logs.update({prefix + name: value for name, value in metrics.items()})
            if logs.get(f"{prefix}samples_per_second") == 0:  # transformers cannot count the pairs of a stream
                logs[f"{prefix}samples_per_second"] = round(len(rows) / logs[f"{prefix}runtime"], 3)
            if mode == "train":
                logs.update(self.meter.speed(rows))
                earlier = (line["num_tokens"] for line in reversed(self.state.log_history) if "num_tokens" in line)
                logs["num_tokens"] = next(earlier, 0) + int(rows[:, COLUMNS.index("tokens")].sum())
        elif "train_loss" in logs:  # the run's last line
            logs.update(self.meter.mean_aux_loss(mode))
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; its time does not count in pairs per second."""
        with self.meter.pause():
            return super().evaluate(*args, **kwargs)
