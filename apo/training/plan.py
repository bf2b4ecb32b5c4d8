"""A recipe checked, with everything known that can be known without loading a weight: pairs, steps, costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.distributed.launch import check_devices, deepspeed_requested, fsdp_requested
from apo.models import load as models
from apo.monitoring.guard import load_guard
from apo.run_dir import files as runs
from apo.training.config import TrainConfig, lora_config, trainer_options
from apo.training.optimizer_check import check_optimizer
from clair.core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from apo.cost.memory import Job
    from apo.cost.sizes import Device
    from apo.data.tokenize import Tokenized
    from apo.monitoring.guard import GuardSet
    from apo.training.trainer_config import APOConfig


@dataclass(frozen=True)
class Plan:
    """Everything checked and nothing trained: what a dry run tells."""

    config: TrainConfig
    name: models.ModelName
    tokenizer: Any
    args: APOConfig
    train: Tokenized
    eval: Tokenized | None
    steps: int
    day: str
    guard_set: GuardSet | None = None
    processes: int = 1

    @property
    def pairs_per_step(self) -> int:
        """Pairs in an optimizer step, over all processes."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.processes

    @property
    def describe_steps(self) -> str:
        """How many steps there will be, in words."""
        of = "pairs" if "pairs" in self.train.size() else "rows"
        on = f" on {self.processes} processes" if self.processes > 1 else ""
        return f"{self.steps:,} of {self.pairs_per_step} {of}{on}"

    def counts(self) -> dict[str, Any]:
        """Pairs (or unpaired rows, and how many are desirable) and drops of both splits, for run.json."""
        splits = {"train": self.train, "eval": self.eval}
        return {name: {**split.size(name), "dropped": split.dropped} for name, split in splits.items() if split}


def plan(config: TrainConfig, processes: int | None = None, day: str | None = None) -> Plan:
    """Check recipe, model folder, tokenizer and every pair, without loading a weight or writing a file.

    `processes` plans a run of so many, which this need not be. `day` is the date (YYYY-MM-DD) that a chat template
    writes as today's, by default that of the run in `config.out` (`runs.template_day`).
    """
    from apo.cost.sizes import check_adapter
    from apo.data.sources import load_eval, load_train
    from apo.data.tokenize import answer_lengths
    from apo.distributed.launch import check_launch
    from apo.losses.mixture import resolve_mixture
    from apo.losses.saturation import objective_notes

    launched = check_launch()
    count = launched if processes is None else processes

    name = models.find_model(config.model, config.trust_remote_code)
    if name.is_adapter and config.lora:
        raise UserError(f"model {config.model} is an adapter and is trained on as it is; leave `lora` out, or merge it")
    tokenizer = models.load_tokenizer(name)
    day = day or runs.template_day(Path(config.out))
    notes: list[str] = []
    train_pairs = load_train(config.dataset, config.seed, config.weights, lambda line: notes.append(f"train: {line}"))
    eval_pairs = load_eval(config.dataset, config.eval, config.weights, lambda line: notes.append(f"eval: {line}"))
    args = trainer_options(config, has_eval=eval_pairs is not None, processes=count)
    if count == launched:
        check_devices(args)
    if config.quantize and (fsdp_requested(args) or deepspeed_requested(args)):
        raise UserError("quantize: 4-bit weights are whole in every process; leave FSDP and DeepSpeed out")
    if config.quantize and "quantization_config" in (args.model_init_kwargs or {}):
        raise UserError("trainer.model_init_kwargs.quantization_config: the recipe's `quantize` says it; leave one out")
    if eval_pairs is None and args.eval_strategy != "no":
        raise UserError("trainer.eval_strategy is set but there are no held-out pairs; set `eval`, or leave it out")
    if config.lora:
        notes += check_adapter(name, lora_config(config))
    ends, context = models.load_generation_config(name), models.context_length(name)
    bound, change = "trainer.max_length", "; raise trainer.max_length"
    if context and context < (args.max_length or math.inf):
        args.max_length, bound, change = context, "all that the model takes", ""
    train = _tokenize(train_pairs, "train", tokenizer, ends, args, day)
    evaluated = _tokenize(eval_pairs, "eval", tokenizer, ends, args, day) if eval_pairs is not None else None
    train.notes.extend(evaluated.notes if evaluated else [])
    train.notes[:0] = notes
    args.check_dataset(train.dataset.column_names)
    if len(train.dataset) < 2:
        why = [note for note in train.notes if "chosen is equal" in note]
        if too_long := train.dropped.get("too_long"):
            why.append(f"{too_long:,} are longer than {args.max_length:,} tokens, {bound}{change}")
        raise UserError(f"{len(train.dataset)} row(s) are left to train on: {'; '.join(why)}")
    train.notes.extend(objective_notes(resolve_mixture(args.objective), args.beta, answer_lengths(train.dataset)))
    if any("too_long" in split.dropped for split in (train, evaluated) if split):
        train.notes.append(f"too long is more than {args.max_length:,} tokens, {bound}")
    if args.shared_prefix and args.pack_tokens:
        train.notes.extend(_over_budget(train.dataset, args.pack_tokens))
    guard_set = load_guard(config.guard, tokenizer, ends, context, day) if config.guard else None
    steps = _steps(args, len(train.dataset), count)
    check_optimizer(args, steps)
    return Plan(config, name, tokenizer, args, train, evaluated, steps, day, guard_set, count)


@dataclass(frozen=True)
class Estimate:
    """What a checked plan will cost: as it runs on a GPU (True) and on a CPU (False)."""

    jobs: dict[bool, Job]
    machine: Device

    @property
    def here(self) -> Job:
        """The run on the machine it starts on."""
        return self.jobs[self.machine.is_gpu]


def estimate(planned: Plan) -> Estimate | str:
    """Return the costs of a plan, or the reason why they cannot be estimated."""
    from apo.cost.deepspeed_memory import parse_zero_config
    from apo.cost.memory import build_job
    from apo.cost.sizes import model_sizes, this_machine
    from apo.losses.mixture import resolve_mixture

    config, args = planned.config, planned.args
    machine = this_machine()
    if args.use_cpu and machine.is_gpu:
        return "the run leaves the GPU unused"
    try:
        sizes = model_sizes(planned.name, lora_config(config))
        zero = (
            parse_zero_config(args.deepspeed_plugin.deepspeed_config, sizes.hidden)
            if deepspeed_requested(args)
            else None
        )
    except (ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        return str(error)
    reference = ("cached" if args.precompute_ref_log_probs else "online") if (
        resolve_mixture(config.objective).needs_reference
    ) else None  # fmt: skip
    asked = config.trainer.get("gradient_checkpointing", config.trainer.get("activation_checkpointing"))
    dtype = str((args.model_init_kwargs or {}).get("dtype", "float32"))
    jobs = {
        on_gpu: build_job(
            sizes, planned.train.dataset, args, planned.steps, reference=reference, dtype=dtype,
            mixed=config.trainer.get("bf16", on_gpu) or args.fp16,
            checkpointing=on_gpu if asked is None else asked, on_gpu=on_gpu,
            mismatched=resolve_mixture(config.objective).needs_divergence, processes=planned.processes,
            sharded=fsdp_requested(args), quantized=config.quantize is not None, zero=zero,
        )
        for on_gpu in (True, False)
    }  # fmt: skip
    return Estimate(jobs, machine)


def _tokenize(pairs: Dataset, split: str, tokenizer: Any, generation: Any, args: APOConfig, day: str) -> Tokenized:
    from apo.data.sources import check_weights
    from apo.data.tokenize import eos_ids, tokenize
    from apo.losses.mixture import resolve_mixture

    if args.weights is not None:
        check_weights(pairs, args.weights, split)
    ends, objective = eos_ids(tokenizer, generation), resolve_mixture(args.objective)
    return tokenize(pairs, tokenizer, args.max_length, ends, split, args.dataset_num_proc, objective, day)


def _over_budget(pairs: Dataset, most: int) -> list[str]:
    """What to tell of pairs that a packed row of `most` tokens cannot hold."""
    from apo.data.tokenize import ID_COLUMNS
    from apo.packing.layout import packed_length

    rows = pairs.select_columns(list(ID_COLUMNS))
    lengths = [0] * len(rows)
    for name in ID_COLUMNS:
        column = rows.with_format("arrow")[name][:].combine_chunks().value_lengths().to_pylist()
        lengths = [one + other for one, other in zip(lengths, column, strict=True)]
    long = [place for place, length in enumerate(lengths) if length > most]  # both sequences, but the prompt once
    sizes = [size for row in rows.select(long) if (size := packed_length(row)) > most]
    if not sizes:
        return []
    told = f"{len(sizes):,} rows are longer than trainer.pack_tokens {most:,}, up to {max(sizes):,} tokens"
    return [f"{told}: each is a pass of its own"]


def _steps(args: APOConfig, pairs: int, processes: int) -> int:
    """Optimizer steps of the run, as the trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = pairs / (args.per_device_train_batch_size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
