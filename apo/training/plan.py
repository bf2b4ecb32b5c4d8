"""The plan of a run: everything that can be checked and estimated without loading a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.distributed.launch import check_devices, deepspeed_requested, fsdp_requested
from apo.models.load import ModelName, context_length, find_model, load_generation_config, load_tokenizer
from apo.monitoring.guard import load_guard
from apo.monitoring.prediction import check_prediction, read_prediction
from apo.run_dir.files import Status, read_run, run_status, template_day
from apo.training.config import TrainConfig, lora_config, trainer_options
from apo.training.optimizer_check import check_optimizer, count_steps
from apo.training.run_json import run_facts
from apo.training.soft_prompt import check_soft_prompt
from clair.core.errors import UserError
from clair.core.recipe import resolved
from clair.inference.model_folder import unknown_variable

if TYPE_CHECKING:
    from datasets import Dataset

    from apo.cost.memory import Job
    from apo.cost.sizes import Device
    from apo.data.tokenize import Tokenized
    from apo.monitoring.guard import GuardSet
    from apo.training.trainer_config import APOConfig


@dataclass(frozen=True)
class Plan:
    """A checked recipe with its tokenized pairs, trainer options and steps. A dry run prints it."""

    config: TrainConfig
    name: ModelName
    tokenizer: Any
    args: APOConfig
    train: Tokenized
    eval: Tokenized | None
    steps: int
    day: str
    guard_set: GuardSet | None = None
    prediction: dict[str, Any] | None = None
    processes: int = 1

    @property
    def pairs_per_step(self) -> int:
        """Pairs per optimizer step, over all processes."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.processes

    @property
    def steps_text(self) -> str:
        """The number of steps as text, as in `6 of 4 pairs`."""
        unit = "pairs" if "pairs" in self.train.size() else "rows"
        suffix = f" on {self.processes} processes" if self.processes > 1 else ""
        return f"{self.steps:,} of {self.pairs_per_step} {unit}{suffix}"

    @property
    def pairs_hash(self) -> str:
        """The hash of the pairs that are trained, with their weights and states."""
        from apo.data.sources import hash_pairs

        return hash_pairs(self.train.dataset, self.config.weights, self.args.soft_prompt)

    def held_out_groups(self) -> list[str | None]:
        """The group of each held-out pair, by the label of the prediction; empty without one."""
        if self.prediction is None or self.eval is None:
            return []
        return [None if value is None else str(value) for value in self.eval.dataset[self.prediction["by"]][:]]

    def counts(self) -> dict[str, Any]:
        """The pairs (or unpaired rows, and the desirable among them) and drops of both splits, for run.json."""
        splits = {"train": self.train, "eval": self.eval}
        return {name: {**split.size(name), "dropped": split.dropped} for name, split in splits.items() if split}


def plan(config: TrainConfig, processes: int | None = None, day: str | None = None) -> Plan:
    """Check recipe, model folder, tokenizer and every pair, without loading a weight or writing a file.

    `processes` is the number of processes to plan for, by default this run's. `day` is the date (YYYY-MM-DD) that a
    chat template writes as today's, by default that of the run in `config.out` (`template_day`). Raises UserError.
    """
    from peft import PeftConfig

    from apo.cost.sizes import check_adapter
    from apo.data.sources import load_eval, load_train
    from apo.data.tokenize import answer_lengths
    from apo.distributed.launch import check_launch
    from apo.losses.mixture import resolve_mixture
    from apo.losses.saturation import objective_notes
    from apo.models.decomposed_lora import is_decomposed
    from apo.training.rows import tokenize_rows

    launched = check_launch()
    count = launched if processes is None else processes

    name = find_model(config.model, config.trust_remote_code)
    if name.is_adapter and config.lora:
        raise UserError(f"model {config.model} is an adapter and is trained as it is; leave `lora` out, or merge it")
    if name.is_adapter and is_decomposed(PeftConfig.from_pretrained(name.path)):
        raise UserError(
            f"model {config.model} is an adapter on a part of its base's weights; merge it (apo merge) first"
        )
    tokenizer = load_tokenizer(name)
    for source in config.dataset:
        if variable := unknown_variable(str(tokenizer.chat_template), source.chat_template_kwargs or ()):
            raise UserError(
                f"dataset.chat_template_kwargs.{variable} would be ignored: the chat template of {config.model} does "
                "not have it; leave it out"
            )
    day = day or template_day(Path(config.out))
    notes: list[str] = []
    states = config.soft_prompt.column if config.soft_prompt else None
    columns = {"weights": config.weights, "states": states}
    train_pairs = load_train(config.dataset, config.seed, note=lambda line: notes.append(f"train: {line}"), **columns)
    prediction = read_prediction(config.prediction) if config.prediction else None
    columns["label"] = prediction["by"] if prediction else None
    eval_pairs = load_eval(config.dataset, config.eval, note=lambda line: notes.append(f"eval: {line}"), **columns)
    args = trainer_options(config, has_eval=eval_pairs is not None, processes=count)
    if count == launched:
        check_devices(args)
    if config.quantize and (fsdp_requested(args) or deepspeed_requested(args)):
        raise UserError("quantize: 4-bit weights are whole in every process; leave FSDP and DeepSpeed out")
    if config.quantize and "quantization_config" in args.loading_options():
        raise UserError("trainer.model_init_kwargs.quantization_config: the recipe's `quantize` sets it; leave one out")
    if eval_pairs is None and args.eval_strategy != "no":
        raise UserError("trainer.eval_strategy is set but there are no held-out pairs; set `eval`, or leave it out")
    for key in ("eval_rows", "prediction"):
        if getattr(config, key) and eval_pairs is None:
            raise UserError(f"{key}: there are no held-out pairs; set `eval`, or leave it out")
    if config.lora:
        notes += check_adapter(name, lora_config(config))
    generation, context = load_generation_config(name), context_length(name)
    limit, advice = "trainer.max_length", "; raise trainer.max_length"
    if context and context < (args.max_length or math.inf):
        args.max_length, limit, advice = context, "the model's context", ""
    train = tokenize_rows(train_pairs, tokenizer, generation, args, "train", day)
    evaluated = tokenize_rows(eval_pairs, tokenizer, generation, args, "eval", day) if eval_pairs is not None else None
    if args.soft_prompt is not None and len(train.dataset):
        check_soft_prompt(args, tokenizer, train.dataset, evaluated and evaluated.dataset)
    for key in ("eval_rows", "prediction"):
        if getattr(config, key) and evaluated and "pairs" not in evaluated.size():
            raise UserError(
                f"{key}: the held-out rows are no pairs, but unpaired; set `eval` to pairs, or leave it out"
            )
    train.notes.extend(evaluated.notes if evaluated else [])
    train.notes[:0] = notes
    args.check_dataset(train.dataset.column_names)
    if len(train.dataset) < 2:
        reasons = [note for note in train.notes if "chosen is equal" in note]
        if too_long := train.dropped.get("too_long"):
            reasons.append(f"{too_long:,} are longer than {args.max_length:,} tokens, {limit}{advice}")
        raise UserError(f"{len(train.dataset)} row(s) are left to train on: {'; '.join(reasons)}")
    train.notes.extend(objective_notes(resolve_mixture(args.objective), args.beta, answer_lengths(train.dataset)))
    if any("too_long" in split.dropped for split in (train, evaluated) if split):
        train.notes.append(f"too long is more than {args.max_length:,} tokens, {limit}")
    held_out: Any = list(evaluated.dataset) if evaluated and config.guard and config.guard.winners else None
    guard_set = load_guard(config.guard, tokenizer, generation, context, day, held_out) if config.guard else None
    steps = count_steps(args, train.dataset, count)
    check_optimizer(args, steps)
    planned = Plan(config, name, tokenizer, args, train, evaluated, steps, day, guard_set, prediction, count)
    if prediction:
        check_prediction(prediction, resolve_mixture(config.objective).name, config.beta, planned.held_out_groups())
    limit_passes(planned)
    if args.shared_prefix and args.pack_tokens:
        train.notes.extend(_oversize_notes(train.dataset, args.pack_tokens))
    return planned


def plan_run(config: TrainConfig) -> tuple[Plan, Status]:
    """Plan the run in `config.out` for the processes that it began with, if it exists. Returns its status too.

    Raises UserError as `plan` does, and if the folder holds a run of another recipe, other pairs or another model.
    """
    out = Path(config.out)
    status = run_status(out, resolved(config))
    planned = plan(config, None if status == "new" else read_run(out).get("processes"))
    if status != "new":
        run_facts(planned, status)
    return planned, status


@dataclass(frozen=True)
class CostEstimate:
    """The cost of a plan on this machine, and on other devices."""

    jobs: dict[Device, Job]
    machine: Device

    @property
    def here(self) -> Job:
        """The run on the machine it starts on."""
        return self.jobs[self.machine]


def estimate(planned: Plan, others: Sequence[Device] = ()) -> CostEstimate | str:
    """Return the costs of a plan on this machine and on `others`, or the reason why they cannot be estimated.

    On a GPU, checkpointing and the limit of a pass that the recipe leaves open are those of `choose_passes`.
    """
    from apo.cost.deepspeed_memory import parse_zero_config
    from apo.cost.fitting import PASS_TOKENS, choose_passes
    from apo.cost.memory import build_job, sample_pairs
    from apo.cost.sizes import model_sizes, this_machine
    from apo.losses.mixture import resolve_mixture

    config, args = planned.config, planned.args
    machine = this_machine()
    if args.use_cpu and machine.is_gpu:
        return "the run leaves the GPU unused"
    try:
        sizes = model_sizes(planned.name, lora_config(config))
        plugin: Any = args.deepspeed_plugin
        zero = parse_zero_config(plugin.deepspeed_config, sizes.hidden) if deepspeed_requested(args) else None
    except (ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        return str(error)
    objective = resolve_mixture(config.objective)
    reference = ("cached" if args.precompute_ref_log_probs else "online") if objective.needs_reference else None
    checkpointing = config.trainer.get("gradient_checkpointing", config.trainer.get("activation_checkpointing"))
    dtype = str(args.loading_options().get("dtype", "float32"))
    examples, stands_for = sample_pairs(planned.train.dataset)

    @functools.cache
    def build(on_gpu: bool, checkpointing: bool, pack_tokens: int | None) -> Job:
        return build_job(
            sizes,
            examples,
            args,
            planned.steps,
            stands_for=stands_for,
            reference=reference,
            dtype=dtype,
            mixed=config.trainer.get("bf16", on_gpu) or args.fp16,
            checkpointing=checkpointing,
            pack_tokens=pack_tokens,
            on_gpu=on_gpu,
            mismatched=objective.needs_divergence,
            processes=planned.processes,
            sharded=fsdp_requested(args),
            quantized=config.quantize is not None,
            zero=zero,
        )

    jobs = {}
    for device in (machine, *others):
        if not device.is_gpu:
            jobs[device] = build(False, bool(checkpointing), args.pack_tokens)
            continue
        set_by_recipe = not args.shared_prefix or "pack_tokens" in config.trainer
        limits = (config.trainer.get("pack_tokens"),) if set_by_recipe else PASS_TOKENS
        jobs[device] = choose_passes(functools.partial(build, True), device, checkpointing, limits)
    return CostEstimate(jobs, machine)


def limit_passes(planned: Plan) -> None:
    """Set activation checkpointing and `pack_tokens` on a GPU, if the recipe leaves them open, by the estimate."""
    from apo.cost.fitting import describe_passes, required_memory
    from apo.cost.sizes import GIB

    costs, args = estimate(planned), planned.args
    if isinstance(costs, str) or not costs.machine.is_gpu:
        return
    job, machine = costs.here, costs.machine
    if (args.pack_tokens, args.activation_checkpointing) == (job.pack_tokens, job.checkpointing):
        return
    args.pack_tokens = job.pack_tokens
    args.activation_checkpointing = args.gradient_checkpointing = job.checkpointing
    needed = f"{required_memory(job, machine) / GIB:.1f} of {machine.memory / GIB:.1f} GiB"
    planned.train.notes.append(
        f"by the estimate of memory ({needed}): {describe_passes(job)}; a recipe that "
        "sets trainer.pack_tokens or trainer.gradient_checkpointing decides itself"
    )


def _oversize_notes(pairs: Dataset, max_tokens: int) -> list[str]:
    """A note on the pairs that a packed row of `max_tokens` cannot hold."""
    from apo.data.tokenize import ID_COLUMNS, column_lengths
    from apo.packing.layout import packed_length

    columns = (column_lengths(pairs, name) for name in ID_COLUMNS)
    # An upper bound: the sum of both sequences, the prompt once; packing also shares a common start of the answers.
    long = [index for index, lengths in enumerate(zip(*columns, strict=True)) if sum(lengths) > max_tokens]
    rows: list[Any] = pairs.select_columns([*ID_COLUMNS]).select(long).to_list()
    sizes = [size for row in rows if (size := packed_length(row)) > max_tokens]
    if not sizes:
        return []
    count = f"{len(sizes):,} rows are longer than trainer.pack_tokens {max_tokens:,}, up to {max(sizes):,} tokens"
    return [f"{count}: each is a pass of its own"]
