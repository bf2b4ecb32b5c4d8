"""APOTrainer: TRL's DPOTrainer with `compute_loss` overridden, blind to the objective.

Two plug points, both plain functions: the objective (objectives.py) and `pair_logps(model, batch)` (logps.py).
Every pair of an optimizer step weighs the same, however it is cut into micro-batches and spread over processes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head, use_adapter

from apo import checkpoints
from apo.arguments import APOConfig
from apo.cache import hash_model
from apo.console import pace
from apo.dynamics import measure, pair_rows, work_of
from apo.faults import LossWatch, check_gradient, check_weights_finite, is_out_of_memory, memory_watched
from apo.logps import (
    IDLE,
    IDS,
    PAIR_WEIGHT,
    Batch,
    PairLogpsFunction,
    WeightedCollator,
    examples_of,
    idle,
    mismatched,
    select,
    stacked_logps,
    weights_of,
)
from apo.meter import Meter, scale_of
from apo.mixture import mixture_of
from apo.pairs import check_weights
from apo.prefix import (
    around_the_parting,
    bins_of,
    share_if_exact,
    shared_prefix_logps,
    tokens_of,
)
from apo.processes import asks_for_fsdp, check_devices
from apo.reference import Advance, with_reference
from apo.tokens import end_ids, tokenize
from apo.transfer import to_device
from apo.zero import check_zero, get_ready, hush, tell, unfinished
from clair.recipe import UserError

SMALLEST_WEIGHT = 1e-30
"""What a step is divided by at least, so that one whose pairs all weigh 0 has loss 0 and not NaN."""


class APOTrainer(DPOTrainer):
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

    @property
    def packs(self) -> bool:
        """Whether pairs are asked for in packed rows, without padding, each prompt once."""
        return self.pair_logps is shared_prefix_logps

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator; of FSDP, TRL is told when it is built, and of ZeRO-3 transformers when training starts.

        The model is whole until then, and so the reference's log-probs are computed by it. TRL would load a second
        model for them.
        """
        super().create_accelerator_and_postprocess()
        self._shards, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        self._deepspeed_config = hush() if self.is_deepspeed_enabled else None

    def _share_prefixes(self) -> None:
        """Ask in packed rows from now on, if the model can be and agrees with TRL's batch on two pairs."""
        if self.is_deepspeed_enabled:
            self.model.to(self.args.device)  # transformers leaves that to DeepSpeed, and the model is asked before
        if not self._may_share:
            return
        self._may_share = False
        # A reference of its own may be DeepSpeed's already; what is asked is the model inside.
        asked = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        size = min(self.args.per_device_train_batch_size, len(self.train_dataset))
        first = self._prepare_inputs(self.data_collator([self.train_dataset[place] for place in range(size)]))
        short = self._prepare_inputs(self.data_collator(self._shortest_pairs()))
        computed = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        told = {"autocast": self.accelerator.autocast, "fatal": is_out_of_memory}
        reason, notes = share_if_exact(asked, short, first, computed, **told)
        self.notes += notes
        if reason is None:
            self.pair_logps = shared_prefix_logps
        else:
            self.notes.append(f"prompts are run twice and batches padded, as in TRL: the model cannot share, {reason}")

    def get_train_dataloader(self) -> Any:
        """Its batches stay on the host: what of them goes to the device, `_prepare_input` sends."""
        return _on_host(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the one of training."""
        return _on_host(super().get_eval_dataloader(*args, **kwargs))

    def _prepare_input(self, data: Any) -> Any:
        """On the device, in its own type: under DeepSpeed transformers rounds log-probs to that of the weights.

        Ids that are packed first stay here; weights there say where the row goes.
        """
        if isinstance(data, Mapping) and "input_ids" in data and self.packs:
            here = {key: data[key] for key in IDS}
            there = {key: value for key, value in data.items() if key not in IDS}
            ones = torch.ones(len(data["input_ids"]) // 2, device=self.args.device)
            return here | super()._prepare_input({PAIR_WEIGHT: ones} | there)
        return to_device(data, self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _shortest_pairs(self) -> list[dict[str, Any]]:
        """Two pairs to compare packed rows with TRL's batch on: no longer than they must be.

        Long ones are cut to what lies around the place where their answers part, unless the model has windows.
        """
        pairs = [self.train_dataset[place] for place in range(min(64, len(self.train_dataset)))]
        if getattr(self.model.config.get_text_config(), "sliding_window", None):
            return sorted(pairs, key=tokens_of, reverse=True)[:2]
        return [around_the_parting(pair) for pair in sorted(pairs, key=tokens_of)[:2]]

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
        if self.args.weights is not None and self.args.weights not in self._signature_columns:
            self._signature_columns.append(self.args.weights)

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

    @property
    def _most_tokens(self) -> int | None:
        """Tokens that a forward pass may have, where anything bounds them."""
        return self.args.pack_tokens if self.packs else None

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

    def _reference_logps(self, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

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
        self._share_prefixes()
        model = self.ref_model or self.model
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
        identity = (self._hash_of_reference(model), *self._numbers_of_reference(model)) if folder else ()
        with memory_watched(self, "the reference's log-probs"):
            dataset, computed = with_reference(
                dataset, identity, compute, folder, self.notes.append,
                rank=self.args.process_index, processes=self.args.world_size,
                exchange=lambda mine: gather_object([mine]),
                watched=lambda count: pace(f"reference log-probs, {name}", count, shown=self.args.process_index == 0),
            )  # fmt: skip
        self.reference_computed[name] = computed
        return dataset

    def _passes(self, pairs: Sequence[dict[str, Any]], batch_size: int) -> list[list[int]]:
        """Which pairs are asked for together, where there is no gradient: their places."""
        sizes = [tokens_of(pair) for pair in pairs]
        if self._most_tokens is not None:
            return bins_of(sizes, self._most_tokens)
        alike = sorted(range(len(pairs)), key=sizes.__getitem__)  # like lengths, little padding
        return [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]

    def response_logps(self, examples: Sequence[dict[str, Any]]) -> list[float]:
        """Log-prob of the chosen response of each example (id columns, no rejected one) by the model as it is.

        Shared out over the processes, each of which has to ask, and gets all. Draws no random number.
        """
        bins = self._passes(examples, self.args.per_device_eval_batch_size)
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        collate = getattr(self.data_collator, "collate", self.data_collator)
        found = torch.zeros(len(examples), dtype=torch.float64, device=self.accelerator.device)
        training = self.model.training
        self.model.eval()
        for start in range(0, len(bins), count):
            mine = bins[start + rank] if start + rank < len(bins) else bins[0]  # so that all run equally many passes
            batch = self._prepare_inputs(collate([examples[place] for place in mine]))
            with torch.no_grad(), self.compute_loss_context_manager():
                logps = self.pair_logps(self.model, batch).chosen
            if start + rank < len(bins):
                found[mine] = logps.to(found.dtype)
        self.model.train(training)
        return self._over_processes(found).tolist()

    def _hash_of_reference(self, model: torch.nn.Module) -> str:
        if self._weights_hash is None:
            self._weights_hash = hash_model(model)
        return self._weights_hash

    def _numbers_of_reference(self, model: torch.nn.Module) -> tuple[str, ...]:
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
        training = self.model.training
        self.model.eval()
        weighted = isinstance(self.data_collator, WeightedCollator)
        collate = self.data_collator.collate if weighted else self.data_collator
        for batch in mismatched(batches, collate, gather_object, self.accelerator.process_index):
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                policy = self.pair_logps(self.model, batch)
            reference = self._reference_logps(batch)
            ratios = torch.cat([policy.chosen - reference[0], policy.rejected - reference[1]]).float()
            lengths = torch.cat([policy.chosen_len, policy.rejected_len])
            if IDLE not in batch:  # which is run all the same: sharded processes run equally many
                total += torch.stack([ratios.sum(), (ratios / lengths.clamp(min=1)).sum(), (lengths > 0).sum()])
        self.model.train(training)
        total = self._over_processes(total)
        return total[:2] / total[2].clamp(min=1)

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

    def _over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor, "sum")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; its time does not count into pairs a second."""
        with self.meter.pause():
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone: logits are never built."""
        inputs = self._without_repeats(inputs, self.args.eval_batch_size)
        return super().prediction_step(model, inputs, True, ignore_keys)

    # What is kept

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is there wholly or not at all (checkpoints.py)."""
        self._losses.settle(self)
        check_weights_finite(self)
        with self.meter.pause():
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
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
