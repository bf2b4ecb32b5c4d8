"""APOTrainer: TRL's DPOTrainer with `compute_loss` overridden, blind to the objective.

Two plug points, both plain functions: the objective (objectives.py) and `pair_logps(model, batch)` (logps.py).
Every pair of an optimizer step weighs the same, however it is cut into micro-batches and spread over processes.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.utils import add_fused_lm_head

from apo import checkpoints
from apo.arguments import APOConfig
from apo.asking import AskingTrainer
from apo.dynamics import measure, pair_rows, work_of
from apo.faults import LossWatch, check_gradient, check_weights_finite, disk_watched, memory_watched
from apo.logps import (
    IDLE,
    Batch,
    PairLogpsFunction,
    WeightedCollator,
    examples_of,
    idle,
    select,
    stacked_logps,
    weights_of,
)
from apo.meter import Meter, scale_of
from apo.mixture import mixture_of
from apo.pairs import check_weights
from apo.prefix import (
    bins_of,
    tokens_of,
)
from apo.processes import asks_for_fsdp, check_devices
from apo.tokens import MASK_COLUMNS, end_ids, tokenize
from apo.transfer import to_device
from apo.zero import check_zero, get_ready, hush, tell, unfinished
from clair.recipe import UserError

SMALLEST_WEIGHT = 1e-30
"""What a step is divided by at least, so that one whose pairs all weigh 0 has loss 0 and not NaN."""


class APOTrainer(AskingTrainer):
    """DPOTrainer for any objective on pairs.

    The reference is what `model` is at the start: for full fine-tuning a frozen copy, for a new LoRA adapter the model
    with the adapter off, for an existing adapter TRL's frozen "ref" copy of it. `dropped` counts the pairs left out of
    each dataset, by reason; `reference_computed` the pairs whose reference log-probs were not in the cache.
    """

    _tag_names = ("apo",)
    # compute_loss divides by the pairs of the whole accumulation window, so the loop must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: APOConfig | None = None,
        pair_logps: PairLogpsFunction | None = None,
        **kwargs: Any,
    ) -> None:
        args = APOConfig() if args is None else args
        if not isinstance(args, APOConfig):
            raise UserError(f"args is a {type(args).__name__}; APOTrainer takes an APOConfig")
        if kwargs.get("compute_metrics") is not None:
            raise UserError("compute_metrics would be ignored: the batch's logits are never built; leave it out")
        check_devices(args)
        check_zero(args)
        if isinstance(model, torch.nn.Module):
            get_ready(model, args)
        self.objective = mixture_of(args.objective)
        self.pair_logps = pair_logps or stacked_logps
        self._may_share = pair_logps is None and args.shared_prefix
        self.dropped: dict[str, dict[str, int]] = {}
        self.reference_computed: dict[str, int] = {}
        self.current_batch: Batch | None = None
        self._weights_hash: str | None = None
        self.notes: list[str] = []
        self._ends_of_model = getattr(model, "generation_config", None)
        self._kl: torch.Tensor | tuple[float, float] = (0.0, 0.0)
        self._saving = False
        asked = args.precompute_ref_log_probs
        adapts = kwargs.get("peft_config") is not None or is_peft_model(model)
        if asks_for_fsdp(args) and self.objective.needs_reference and not asked and not adapts:
            raise UserError(
                "under FSDP the reference of full fine-tuning would be a second model, whole in every process; set "
                "reference: cached (precompute_ref_log_probs), or train an adapter"
            )
        if not self.objective.needs_reference:
            # The one switch that keeps TRL from loading a second model; `_precompute_ref_logps` then does nothing.
            args.precompute_ref_log_probs = True
        elif ref_model is None and not asked and _can_be_copied(model, args, kwargs.get("peft_config")):
            ref_model = copy.deepcopy(model).eval().requires_grad_(False)
        uses_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
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
        self._share_prefixes()
        self.meter = Meter(self.accelerator, scale_of(self.model, self.args.device))
        self._losses = LossWatch(self.args.device)
        window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.objective.needs_divergence and window < 2:
            raise UserError(
                f"objective {self.objective.name} compares each prompt with another one's answers: "
                "per_device_train_batch_size x gradient_accumulation_steps x processes must be at least 2"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator; of FSDP, TRL is told when it is built, and of ZeRO-3 transformers when training starts.

        The model is whole until then, and so the reference's log-probs are computed by it. TRL would load a second
        model for them.
        """
        super().create_accelerator_and_postprocess()
        self._shards, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        self._deepspeed_config = hush() if self.is_deepspeed_enabled else None

    # The data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise UserError(f"{dataset_name} dataset is a {type(dataset).__name__}; give a datasets.Dataset")
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UserError(f"a {type(processing_class).__name__} is no tokenizer; only text models can be trained")
        ends = end_ids(processing_class, self._ends_of_model)
        if args.weights is not None:
            check_weights(dataset, args.weights, dataset_name)
        done = tokenize(
            dataset, processing_class, args.max_length, ends, dataset_name, args.dataset_num_proc, self.objective
        )
        self.dropped[dataset_name] = done.dropped
        self.notes += done.notes
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
            batches[-1] = self._without_repeats(batches[-1], self._train_batch_size)
        if self.objective.needs_divergence:
            self._kl = self._divergence(batches)
        weight = sum((weights_of(batch).sum() for batch in batches), torch.zeros(()))
        return batches, self._over_processes(to_device(weight, device))

    def _without_repeats(self, batch: Batch, size: int) -> Batch:
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
        return select(batch, range(mine)) if mine else idle(batch)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        more = [*MASK_COLUMNS, *([] if self.args.weights is None else [self.args.weights])]
        self._signature_columns += [column for column in more if column not in self._signature_columns]

    # The loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training. Raises `faults.Stopped` where the memory is used up or a loss is not finite."""
        tell(self._deepspeed_config)
        with memory_watched(self, "training"):
            return super().train(*args, **kwargs)

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
            return unfinished(self.accelerator)
        # DDP: processes may have different numbers of parts, and meet at the last. FSDP adds up what is sharded.
        return contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    def _parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        if self._most_tokens is None:
            return [inputs]
        places = bins_of([tokens_of(example) for example in examples_of(inputs)], self._most_tokens)
        parts = [inputs] if len(places) == 1 else [select(inputs, bin) for bin in places]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Each pass gathers the weights or reduces the gradients of all processes, so all make equally many.
            passes = torch.tensor([len(parts)], device=self.args.device)
            parts += [idle(inputs)] * (int(self.accelerator.gather(passes).max()) - len(parts))
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
        weights = weights_of(inputs).to(losses.device)
        if mode == "train":
            self._losses.look(self, losses, inputs)
        work = to_device(work_of(inputs, packed=self.packs), losses.device)
        rows = pair_rows(losses, policy, reference, weights, self._kl, work)
        self.meter.add(mode, rows[:0] if IDLE in inputs else rows)
        whole = weights.sum() if num_items_in_batch is None else num_items_in_batch
        total = (weights * losses).sum()
        if policy.aux_loss is not None:
            total = total + self.router_aux_loss_coef * policy.aux_loss * weights.sum()
        # Gradients are averaged over processes afterwards; `whole` is the weight of the pairs of all of them.
        processes = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return total * processes / torch.as_tensor(whole, device=total.device).clamp(min=SMALLEST_WEIGHT)

    # The logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what dynamics.py measures on the pairs since the last log, gathered at logging steps only."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        if self.meter.has(mode) and ("loss" in logs or mode == "eval"):
            prefix = "" if mode == "train" else next(key for key in logs if key.endswith("_loss")).removesuffix("loss")
            if mode == "train":
                self._losses.settle(self)
                check_gradient(self, logs.get("grad_norm"))
            rows = self.meter.take(mode)
            logs.update({prefix + name: value for name, value in measure(rows, self.objective, self.beta).items()})
            if mode == "train":
                logs.update(self.meter.speed(rows))
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; its time does not count into pairs a second."""
        with self.meter.pause():
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone: logits are never built. In the precision of training, also where there was none yet."""
        inputs = self._without_repeats(inputs, self.args.eval_batch_size)
        with self.accelerator.autocast():
            return super().prediction_step(model, inputs, True, ignore_keys)

    # What is kept

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is there wholly or not at all (checkpoints.py)."""
        self._losses.settle(self)
        check_weights_finite(self)
        with self.meter.pause():
            self._saving = True
            try:
                with disk_watched(self, "the checkpoint"):
                    super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                with disk_watched(self, "the checkpoint"):
                    self._put_checkpoint_in_place()
            self.accelerator.wait_for_everyone()

    def _put_checkpoint_in_place(self) -> None:
        out = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        folder = out / checkpoints.UNFINISHED / name
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(out / name)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        checkpoints.finish(folder, out / name, resumable=not self.args.save_only_model)
        rotate_checkpoints(str(out), self.args.save_total_limit, self.state.best_model_checkpoint)

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


def _on_host(loader: Any) -> Any:
    loader.device = None  # accelerate's: where it sends batches, and waits for them to arrive
    return loader


def _can_be_copied(model: Any, args: APOConfig, peft_config: Any) -> bool:
    """Whether the reference can be a copy in memory; where it cannot, TRL loads the model's folder a second time."""
    if isinstance(model, str) or peft_config is not None or is_peft_model(model):
        return False
    return not (args.fsdp or getattr(model, "hf_device_map", None))
