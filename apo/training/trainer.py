"""APOTrainer: TRL's DPOTrainer with `compute_loss` overridden, blind to the objective.

Two plug points, both plain functions: the objective (objectives.py) and `pair_logps(model, batch)` (logps.py).
Every pair of an optimizer step weighs the same, however it is cut into micro-batches and spread over processes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy, rotate_checkpoints, set_seed
from transformers.utils.hub import PushInProgress, hf_api
from trl.trainer.utils import add_fused_lm_head

from apo.data.sources import check_weights
from apo.data.tokenize import MASK_COLUMNS, answer_lengths, eos_ids, first_row, tokenize, tokenize_stream
from apo.distributed.deepspeed import (
    accumulate_gradients,
    cast_for_deepspeed,
    check_zero3_saves,
    register_zero3,
    unregister_zero3,
    unsharded_loading,
)
from apo.distributed.launch import check_devices, fsdp_requested
from apo.losses.mixture import resolve_mixture
from apo.losses.saturation import objective_notes
from apo.models import load as models
from apo.monitoring.failures import (
    NonFiniteLossCheck,
    Stopped,
    check_gradient,
    check_weights_finite,
    checkpoint_hint,
    stop_on_out_of_memory,
    stop_on_write_error,
)
from apo.monitoring.metrics import COLUMNS, aggregate_metrics, check_best_metric, per_pair_metrics, token_counts
from apo.monitoring.throughput import Meter, compute_scale
from apo.packing.async_copy import to_device
from apo.packing.batch import DUMMY, Batch, WeightedCollator, dummy_batch, pair_weights, select_pairs, uncollate
from apo.packing.layout import pack_bins, packed_length
from apo.packing.logps import PairLogpsFunction, padded_logps
from apo.run_dir import checkpoints
from apo.training.config import setup_errors
from apo.training.logprobs import PRECOMPUTES_NO_STREAM, LogprobTrainer
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError, one_line

_LOG = logging.getLogger(__name__)
_PUBLIC = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.png")
_PRIVATE = ("*/*", ".*", "trainer_state.json", checkpoints.MARKER)
"""What of a run's folder, or of a checkpoint, goes to the hub, and what of that does not."""
_SAMPLE = 65_536
"""Numbers of a weight that are looked at to tell how many a step changes."""
SMALLEST_WEIGHT = 1e-30
"""What a step is divided by at least, so that one whose pairs all weigh 0 has loss 0 and not NaN."""


class APOTrainer(LogprobTrainer):
    """DPOTrainer for any objective on pairs.

    `model` is a model, a folder or a hub name; such a name is loaded with `args.model_init_kwargs`, in float32 unless
    they say otherwise, an adapter on its base. The reference is what `model` is at the start: for full fine-tuning a
    frozen copy, for a new LoRA adapter the model with the adapter off, for an existing adapter TRL's frozen "ref" copy
    of it. Datasets may be streams (IterableDataset), tokenised as they come. `dropped` counts the pairs left out of
    each dataset, by reason; `reference_computed` the pairs whose reference log-probs were not in the cache. `notes` are
    what the user should know of data, model and options; `tell` gets each, by default a warning in Python's log.
    `verified_checkpoint` is one whose files have just been hashed: `train` goes on from it without reading them twice.
    """

    # compute_loss divides by the pairs of the whole accumulation window, so the loop must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: APOConfig | None = None,
        pair_logps: PairLogpsFunction | None = None,
        tell: Callable[[str], None] = _LOG.warning,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = APOConfig(f"{Path(_name_of(model)).name}-APO")
        if not isinstance(args, APOConfig):
            raise UserError(f"args is a {type(args).__name__}; APOTrainer takes an APOConfig")
        if kwargs.get("compute_metrics") is not None:
            raise UserError("compute_metrics would be ignored: the batch's logits are never built; leave it out")
        self.objective = resolve_mixture(args.objective)
        check_best_metric(args.metric_for_best_model, self.objective)
        _check_no_images(kwargs.get("train_dataset"), packed=pair_logps is None and args.shared_prefix)
        check_devices(args)
        check_zero3_saves(args)
        _check_streams(args, kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        if isinstance(kwargs.get("train_dataset"), Dataset | IterableDataset):
            first_row(kwargs["train_dataset"], "train")
        by_name = isinstance(model, str)
        if by_name:
            model = _load(model, args, kwargs)
        if isinstance(model, torch.nn.Module):
            cast_for_deepspeed(model, args)
        # TRL's own tags, of the trainer that this one is for such rows, and ours.
        self._tag_names = ["trl", "kto" if self.objective.paired_only_reason is None else "dpo", "apo"]
        self.pair_logps = pair_logps or padded_logps
        self._may_pack = pair_logps is None and args.shared_prefix
        self.dropped: dict[str, dict[str, int]] = {}
        self.reference_computed: dict[str, int] = {}
        self.current_batch: Batch | None = None
        self.verified_checkpoint: Path | None = None
        self._weights_hash: str | None = None
        self.notes: list[str] = []
        self._generation_config = getattr(model, "generation_config", None)
        self._kl: torch.Tensor | tuple[float, float] = (0.0, 0.0)
        self._saving = False
        self._aux_losses: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        asked = args.precompute_ref_log_probs
        adapts = kwargs.get("peft_config") is not None or is_peft_model(model)
        # The cache has what pairs need. KTO's divergence asks the reference on the way besides.
        asks_on_the_way = self.objective.needs_reference and (not asked or self.objective.needs_divergence)
        if fsdp_requested(args) and asks_on_the_way and not adapts:
            raise UserError(
                "under FSDP the reference of full fine-tuning would be a second model, whole in every process; set "
                "reference: cached (precompute_ref_log_probs), or train an adapter"
            )
        if not self.objective.needs_reference:
            # The one switch that keeps TRL from loading a second model; `_precompute_ref_logps` then does nothing.
            args.precompute_ref_log_probs = True
        elif ref_model is None and asks_on_the_way and _can_be_copied(model, args, kwargs.get("peft_config")):
            ref_model = copy.deepcopy(model).eval().requires_grad_(False)
        uses_cache = getattr(getattr(model, "config", None), "use_cache", None)
        options = args.model_init_kwargs
        if by_name and (ref_model is not None or adapts or not asks_on_the_way):
            args.model_init_kwargs = None  # else TRL would say of them that they are ignored
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        args.model_init_kwargs = options
        self.is_fsdp_enabled = self._shards
        if getattr(model, "is_loaded_in_4bit", False):  # TRL has put the adapter into bfloat16, which drops small steps
            for weight in self.model.parameters():
                weight.data = weight.data.float() if weight.requires_grad else weight.data
        args.precompute_ref_log_probs = self.precompute_ref_logps = asked
        if args.weights is not None and not isinstance(self.data_collator, WeightedCollator):
            self.data_collator = WeightedCollator(self.data_collator, args.weights)
        self._uses_cache = self.model.config.use_cache if uses_cache is None else uses_cache
        # TRL's head also computes entropies and mean logits for its own logs; only the log-probs are wanted here.
        add_fused_lm_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self._enable_packing()
        self.meter = Meter(self.accelerator, compute_scale(self.model, self.args.device))
        self._losses = NonFiniteLossCheck(self.args.device)
        window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.objective.needs_divergence and window < 2:
            raise UserError(
                f"objective {self.objective.name} compares each prompt with another one's answers: "
                "per_device_train_batch_size x gradient_accumulation_steps x processes must be at least 2"
            )
        self.notes += [*self._ineffective_options(), *self._rounding_notes()]
        for note in dict.fromkeys(self.notes) if args.process_index == 0 else ():
            tell(note)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """TRL's. Raises UserError for options that it does not take, and a package that is not there."""
        with setup_errors(f"optim {getattr(self.args.optim, 'value', self.args.optim)}", "optim, optim_args and adam_"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. Raises UserError for options that it does not take."""
        kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
        with setup_errors(f"lr_scheduler_type {kind}", "lr_scheduler_kwargs"):
            return super().create_scheduler(*args, **kwargs)

    def _ineffective_options(self) -> list[str]:
        """What to tell of options of TRL's batch that packed rows have no use for."""
        void = {"pad_to_multiple_of": "they are not padded"} if self.is_packed else {}
        if self._max_tokens is not None and self.precompute_ref_logps:
            void["precompute_ref_batch_size"] = "the reference is asked in rows of pack_tokens"
        there = {name: why for name, why in void.items() if getattr(self.args, name) is not None}
        return [f"{name} has no effect on packed rows: {why}; shared_prefix: false brings TRL's batch" for name, why
                in there.items()]  # fmt: skip

    def _rounding_notes(self) -> list[str]:
        """What to tell of trained weights in half precision that a step of the learning rate would not change."""
        rate, sizes, moved = self.args.learning_rate, 0, 0
        half = [weight for weight in self.model.parameters() if weight.requires_grad and weight.dtype.itemsize == 2]
        for weight in half if rate and not self.is_deepspeed_enabled else ():  # DeepSpeed keeps them in float32 too
            some = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLE)]
            sizes, moved = sizes + weight.numel(), moved + (some + rate != some).float().mean().item() * weight.numel()
        if not sizes or moved > sizes / 2:
            return []
        return [
            f"a step of the learning rate, {rate:g}, changes {moved / sizes:.2%} of the trained weights: they are in "
            f"{str(half[0].dtype).removeprefix('torch.')}, in which the rest is rounded back; train them in "
            "float32 (model_init_kwargs: {dtype: float32}; bf16: true computes in bfloat16 all the same), or an adapter"
        ]

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator; of FSDP, TRL is told when it is built, and of ZeRO-3 transformers when training starts.

        The model is whole until then, and so the reference's log-probs are computed by it. TRL would load a second
        model for them.
        """
        super().create_accelerator_and_postprocess()
        self._shards, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        self._deepspeed_config = unregister_zero3() if self.is_deepspeed_enabled else None

    # The data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        if not isinstance(dataset, Dataset | IterableDataset):
            raise UserError(
                f"{dataset_name} dataset is a {type(dataset).__name__}; give a datasets.Dataset or IterableDataset"
            )
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UserError(f"a {type(processing_class).__name__} is no tokenizer; only text models can be trained")
        ends = eos_ids(processing_class, self._generation_config)
        if isinstance(dataset, IterableDataset):
            stream, self.dropped[dataset_name], notes = tokenize_stream(
                dataset, processing_class, args.max_length, ends, dataset_name, self.objective, args.weights
            )
            self.notes += notes
            return stream
        if args.weights is not None:
            check_weights(dataset, args.weights, dataset_name)
        done = tokenize(
            dataset, processing_class, args.max_length, ends, dataset_name, args.dataset_num_proc, self.objective
        )
        self.dropped[dataset_name] = done.dropped
        self.notes += done.notes
        args.check_dataset(done.dataset.column_names)
        if too_long := done.dropped.get("too_long"):
            rows = f"{too_long:,} of {len(dataset):,} rows are longer than max_length {args.max_length:,}"
            self.notes.append(f"{dataset_name}: {rows} and left out; TRL would cut them (truncation_mode)")
        if dataset_name == "train" and done.dataset is not dataset and len(done.dataset):
            self.notes += objective_notes(self.objective, args.beta, answer_lengths(done.dataset))
        if not len(done.dataset):
            limit = args.max_length
            raise UserError(f"every row of the {dataset_name} dataset is longer than max_length {limit}; raise it")
        return done.dataset

    def get_train_dataloader(self) -> Any:
        """Its batches stay on the host: what of them goes to the device, `_prepare_input` sends."""
        return _on_host(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the one of training."""
        return _on_host(super().get_eval_dataloader(*args, **kwargs))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """The micro-batches of an optimizer step, and what the pairs in them weigh over all processes."""
        self.meter.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            batches[-1] = self._drop_repeats(batches[-1], self._train_batch_size)
        if self.objective.needs_divergence:
            self._kl = self._divergence(batches)
        weight = sum((pair_weights(batch).sum() for batch in batches), torch.zeros(()))
        return batches, self._over_processes(to_device(weight, device))

    def _drop_repeats(self, batch: Batch, size: int) -> Batch:
        """A batch of a dataloader without the pairs that it repeats, at its end, to give processes equally many.

        A batch of nothing else becomes idle. `size` is the pairs in a full one.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or self.args.dataloader_drop_last or not state.end_of_dataloader:
            return batch
        over = len(state.active_dataloader.dataset) % (size * processes)
        mine = min(size, max(0, over - self.accelerator.process_index * size)) if over else size
        if mine == size:
            return batch
        return select_pairs(batch, range(mine)) if mine else dummy_batch(batch)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        more = [*MASK_COLUMNS, *([] if self.args.weights is None else [self.args.weights])]
        self._signature_columns += [column for column in more if column not in self._signature_columns]

    # The loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's training. Raises `faults.Stopped` where the memory is used up or a loss is not finite.

        With `resume_from_checkpoint` True it goes on from the newest checkpoint of `output_dir` that is whole; raises
        UserError for a checkpoint of another path that is damaged.
        """
        resume_from_checkpoint = self._checked(resume_from_checkpoint)
        register_zero3(self._deepspeed_config)
        with stop_on_out_of_memory(self, "training"), self._noise():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _checked(self, checkpoint: str | bool | None) -> str | None:
        if checkpoint is True:
            search = checkpoints.find_newest_checkpoint(Path(self.args.output_dir))
            for note in search.notes:
                _LOG.warning(note)
            if search.newest is None:
                raise UserError(f"{self.args.output_dir} holds no whole checkpoint; leave resume_from_checkpoint out")
            return str(search.newest)
        if not checkpoint or Path(checkpoint) == self.verified_checkpoint:
            return checkpoint or None
        ours = (Path(checkpoint) / checkpoints.MARKER).exists()
        if ours and (damage := checkpoints.find_damage(Path(checkpoint))):
            raise UserError(f"{checkpoint} is damaged: {damage}; go on from another checkpoint")
        return checkpoint

    @contextlib.contextmanager
    def _noise(self) -> Iterator[None]:
        """NEFTune's noise by TRL's scale, that of a sequence as long as the longest of the micro-batch: transformers
        would take a packed row for one sequence."""
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None
        if alpha is None:
            yield
            return

        def add(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
            if not module.training:
                return output
            scale = alpha / (self.current_batch["input_ids"].shape[1] * output.shape[-1]) ** 0.5
            return output + torch.empty_like(output).uniform_(-scale, scale)

        handle = self.accelerator.unwrap_model(self.model).get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
            self.neftune_noise_alpha = alpha

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch, in as many passes as `pack_tokens` asks for."""
        parts = self._parts(inputs)
        loss = 0.0
        for part in parts[:-1]:
            with self._apart(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, parts[-1], num_items_in_batch)

    def _apart(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Passes that are not the last of their micro-batch: gradients are added up, and nothing else happens."""
        if self.is_deepspeed_enabled:
            return accumulate_gradients(self.accelerator)
        # DDP: processes may have different numbers of parts, and meet at the last. FSDP adds up what is sharded.
        return contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    def _parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        if self._max_tokens is None:
            return [inputs]
        places = pack_bins([packed_length(example) for example in uncollate(inputs)], self._max_tokens)
        parts = [inputs] if len(places) == 1 else [select_pairs(inputs, bin) for bin in places]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Each pass gathers the weights or reduces the gradients of all processes, so all make equally many.
            passes = torch.tensor([len(parts)], device=self.args.device)
            parts += [dummy_batch(inputs)] * (int(self.accelerator.gather(passes).max()) - len(parts))
        return parts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The weighted mean loss over the pairs of the optimizer step: here sum(w * loss) / `num_items_in_batch`.

        `num_items_in_batch` is sum(w) over the whole step, which is its number of pairs where all weigh 1. A step whose
        pairs all weigh 0 has loss 0.
        """
        mode = "train" if model.training else "eval"
        self.current_batch = inputs
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        policy = self.pair_logps(model, inputs, **options)
        reference = self._reference_logps(inputs) if self.objective.needs_reference else None
        if mode == "eval" and self.objective.needs_divergence:
            self._kl = self._divergence([inputs])
        losses = self.objective.losses(policy, reference, beta=self.beta, kl=self._kl)
        weights = pair_weights(inputs).to(losses.device)
        if mode == "train":
            self._losses.add(self, losses, inputs)
        if policy.aux_loss is not None:
            if DUMMY not in inputs:
                self._aux_losses[mode].append(policy.aux_loss.detach())
            losses = losses + self.router_aux_loss_coef * policy.aux_loss
        work = to_device(token_counts(inputs, packed=self.is_packed), losses.device)
        rows = per_pair_metrics(losses, policy, reference, weights, self._kl, work)
        self.meter.add(mode, rows[:0] if DUMMY in inputs else rows)
        whole = weights.sum() if num_items_in_batch is None else num_items_in_batch
        total = (weights * losses).sum()
        # Gradients are averaged over processes afterwards; `whole` is the weight of the pairs of all of them.
        processes = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return total * processes / torch.as_tensor(whole, device=total.device).clamp(min=SMALLEST_WEIGHT)

    # The logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log, gathered at logging steps only.

        And what TRL logs besides: `num_tokens` trained on so far, both sequences of a pair with their prompts, and a
        mixture of experts' `aux_loss`, its mean over the batches since the last log.
        """
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        if self.meter.has(mode) and ("loss" in logs or mode == "eval"):
            prefix = "" if mode == "train" else next(key for key in logs if key.endswith("_loss")).removesuffix("loss")
            if mode == "train":
                self._losses.flush(self)
                check_gradient(self, logs.get("grad_norm"))
            rows = self.meter.gather(mode)
            logs.update(
                {prefix + name: value for name, value in aggregate_metrics(rows, self.objective, self.beta).items()}
            )
            logs.update(self._aux_loss(mode, prefix))
            if mode == "train":
                logs.update(self.meter.speed(rows))
                before = (row["num_tokens"] for row in reversed(self.state.log_history) if "num_tokens" in row)
                logs["num_tokens"] = next(before, 0) + int(rows[:, COLUMNS.index("tokens")].sum())
        elif "train_loss" in logs:  # the run's last line
            logs.update(self._aux_loss(mode, ""))
        super().log(logs, start_time)

    def _aux_loss(self, mode: str, prefix: str) -> dict[str, float]:
        """The mean over the batches of all processes since it was last asked for, each process counting its own."""
        if not self._aux_losses[mode]:
            return {}
        mean = torch.stack(self._aux_losses[mode]).float().mean()
        self._aux_losses[mode].clear()
        return {f"{prefix}aux_loss": self.accelerator.gather(mean).mean().item()}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; its time does not count into pairs a second."""
        with self.meter.pause():
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone: logits are never built. In the precision of training, also where there was none yet."""
        inputs = self._drop_repeats(inputs, self.args.eval_batch_size)
        with self.accelerator.autocast():
            return super().prediction_step(model, inputs, True, ignore_keys)

    # What is kept

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is there wholly or not at all (checkpoints.py)."""
        self._losses.flush(self)
        check_weights_finite(self)
        with self.meter.pause():
            self._saving = True
            try:
                with stop_on_write_error(self, "the checkpoint"):
                    super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                with stop_on_write_error(self, "the checkpoint"):
                    self._put_checkpoint_in_place()
            self.accelerator.wait_for_everyone()

    def _put_checkpoint_in_place(self) -> None:
        out = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        folder = out / checkpoints.UNFINISHED / name
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(out / name)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        checkpoints.complete_checkpoint(folder, out / name, resumable=not self.args.save_only_model)
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            self._upload(out / name, f"Training in progress, step {self.state.global_step}")
        rotate_checkpoints(str(out), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        """The best checkpoint's weights, as they were written. Raises `faults.Stopped` where they are not."""
        best = Path(self.state.best_model_checkpoint)
        if damage := checkpoints.find_damage(best):
            raise Stopped(f"the best model, {best}, is damaged: {damage}; {checkpoint_hint(self)}")
        super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: it is not in its place yet, and TRL's would upload all that lies in the run's folder."""

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **_: Any,
    ) -> Any:  # fmt: skip
        """Upload model, configs, tokenizer, card and numbers: no checkpoint, optimizer's state or pickle."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token or self.args.hub_token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        job = self._upload(Path(self.args.output_dir), commit_message, token=token, revision=revision)
        return job.result() if blocking else job

    def _upload(self, folder: Path, message: str | None, token: str | None = None, revision: str | None = None) -> Any:
        """Upload a model's files in the background, after those before; what fails is told. Returns a future."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        job = hf_api().upload_folder(
            repo_id=self.hub_model_id, folder_path=folder, commit_message=message, token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision, run_as_future=True, allow_patterns=list(_PUBLIC),
            ignore_patterns=list(_PRIVATE),
        )  # fmt: skip
        job.add_done_callback(_tell_failure)
        self.push_in_progress = PushInProgress([job])
        return job

    def _get_output_dir(self, trial: Any) -> str:
        where = super()._get_output_dir(trial)
        return str(Path(where) / checkpoints.UNFINISHED) if self._saving else where

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights as safetensors (or the trained adapter alone), config, generation config and tokenizer.

        No training_args.bin: it would be a pickle that nothing reads.
        """
        if not self.args.should_save:
            return
        where = output_dir or self.args.output_dir
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        only = {"selected_adapters": ["default"]} if is_peft_model(unwrapped) else {}
        if state_dict is not None:  # gathered from all processes: a tied weight is in it twice
            twice = getattr(unwrapped, "all_tied_weights_keys", None) or {}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in twice}
        while_training, unwrapped.config.use_cache = unwrapped.config.use_cache, self._uses_cache
        with warnings.catch_warnings():  # PEFT tells that it keeps embeddings whose number was changed
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`", UserWarning)
            unwrapped.save_pretrained(where, state_dict=state_dict, **only)
        unwrapped.config.use_cache = while_training
        self.processing_class.save_pretrained(where)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL's card says DPO. `apo train` writes its own at the end."""

    def _send_telemetry(self) -> None:
        """Nothing: what is trained here is nobody else's business."""


def _tell_failure(job: Any) -> None:
    if error := job.exception():
        _LOG.warning("upload to the hub failed: %s", one_line(error))


def _check_no_images(dataset: Any, *, packed: bool) -> None:
    """Raises UserError for a dataset of images, which packed rows have no place for."""
    if packed and (images := {"image", "images"} & set(getattr(dataset, "column_names", None) or ())):
        raise UserError(
            f"the train dataset has a column {min(images)!r}, and packed rows hold text only; set shared_prefix=False, "
            "which trains it in TRL's batch"
        )


def _on_host(loader: Any) -> Any:
    loader.device = None  # accelerate's: where it sends batches, and waits for them to arrive
    return loader


def _name_of(model: Any) -> str:
    """What a model is called: its name or folder, or what its config says it was loaded from; else `model`."""
    return model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "") or "model"


def _load(path: str, args: APOConfig, options: dict[str, Any]) -> torch.nn.Module:
    """The model at `path`, and in `options`, those of the trainer, its tokenizer unless they name one.

    Takes the trainer's `quantization_config` out of them. Seeded, because weights that are not in the file are random.
    """
    more, quantized = dict(args.model_init_kwargs or {}), options.pop("quantization_config", None)
    if quantized is not None:
        if "quantization_config" in more:
            raise UserError("quantization_config is said twice, the other in args.model_init_kwargs; leave one out")
        more["quantization_config"] = quantized
    name = models.find_model(path, more.pop("trust_remote_code", args.trust_remote_code))
    set_seed(args.seed)
    with unsharded_loading():
        model = models.load_model(name, **more)
    if options.get("processing_class") is None:
        options["processing_class"] = models.load_tokenizer(name, revision=more.get("revision"), for_chats=False)
    return model


def _check_streams(args: APOConfig, train: Any, evaluated: Any) -> None:
    """Raises UserError for an IterableDataset where rows have to be known before the first step."""
    held_out = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    if not any(isinstance(dataset, IterableDataset) for dataset in (train, *held_out)):
        return
    if args.precompute_ref_log_probs:
        raise UserError(PRECOMPUTES_NO_STREAM)
    if args.world_size > 1:
        raise UserError(
            f"an IterableDataset cannot be shared out exactly over {args.world_size} processes, because its length is "
            "not known: train it on one, or make a datasets.Dataset of it (Dataset.from_generator keeps it on disk)"
        )


def _can_be_copied(model: Any, args: APOConfig, peft_config: Any) -> bool:
    """Whether the reference can be a copy in memory; where it cannot, TRL loads the model's folder a second time."""
    if peft_config is not None or is_peft_model(model):
        return False
    return not (args.fsdp or getattr(model, "hf_device_map", None))
