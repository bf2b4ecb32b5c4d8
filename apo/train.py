"""TrainConfig and train(): one recipe in, one trained model out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, field_validator

from apo import model as models
from apo import run as runs
from apo.guard import Guard, load_rails
from apo.pairs import Source
from apo.processes import Group, asks_for_deepspeed, asks_for_fsdp, check_deepspeed, check_devices, joined
from clair.recipe import Recipe, UserError, near_miss, resolved, write_json

if TYPE_CHECKING:
    from datasets import Dataset

    from apo import fit
    from apo.arguments import APOConfig
    from apo.guard import Rails
    from apo.tokens import Tokenized
    from apo.trainer import APOTrainer

OWN_KEYS = {
    "output_dir": "out",
    "seed": "seed",
    "beta": "beta",
    "objective": "objective",
    "weights": "weights",
    "trust_remote_code": "trust_remote_code",
    "precompute_ref_log_probs": "reference",
    "reference_cache": "reference",
}
"""Options of TRL that the recipe says at its top."""
NOT_OFFERED = ("resume_from_checkpoint", "push_to_hub", "do_train", "do_eval", "do_predict", "remove_unused_columns")


class LoRA(Recipe):
    """`lora:` of a training recipe. Absent: the whole model is trained."""

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    """Module names, or `all-linear`: every linear layer but the LM head."""


def _listed(value: Any) -> Any:
    """A recipe's `dataset` as a list of sources, so that an error names the key and not an arm of a union."""
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": one} if isinstance(one, str) else one for one in values]


class TrainConfig(Recipe):
    """A training recipe. See docs/training.md."""

    model: str
    """A model folder, a folder with a LoRA adapter to train on, or a hub name."""
    dataset: Annotated[list[Source], BeforeValidator(_listed)]
    """One source or several; a text is a source's path."""
    by: str | None = None
    """A column of the pairs: a run for each of its values, each in a folder of `out`. Absent: one run on all."""
    objective: str | dict[Any, Any] | Callable[..., Any] = "apo_zero"
    """An objective's name, or several with weights and options (mixture.py); from Python also functions."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    weights: str | None = None
    """The dataset column that says how much each pair weighs: numbers, finite and >= 0. Absent: all alike."""
    lora: LoRA | None = None
    quantize: Literal["nf4"] | None = None
    """`nf4`: the weights below the adapter are kept in 4 bits (QLoRA). Absent: in the type they are loaded in."""
    pairs_per_step: Annotated[int, Field(gt=0)] | None = None
    """Pairs in an optimizer step, over all processes. Absent: what `trainer` and the number of processes come to."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Options of TRL's DPOConfig and transformers' TrainingArguments, passed on untouched."""
    eval: bool | str = True
    """Held-out pairs: true is the split `test` where there is one, a name that split, false none."""
    reference: Literal["cached", "online"] = "cached"
    """`cached`: the reference's log-probs are computed before the first step, once per model and pairs for all runs;
    `online`: at every step, by a second copy of the model."""
    guard: Guard | None = None
    """Held-out text and tasks that the model may not lose. Absent: none are looked at."""
    probe: Annotated[int, Field(ge=0)] | None = None
    """Pairs looked at token by token (probe.py). Absent: one for a hundred trained, at most 16; 0: none."""
    seed: int = 0
    out: str
    trust_remote_code: bool = False

    @field_validator("quantize")
    @classmethod
    def _below_an_adapter(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not info.data.get("lora"):
            raise ValueError(f"{value} weights cannot be trained, an adapter on them can: set `lora: {{r: 16}}` beside")
        return value

    @field_validator("objective")
    @classmethod
    def _known(cls, value: Any) -> Any:
        from apo.mixture import mixture_of

        mixture_of(value)
        return value

    @field_serializer("objective")
    def _by_name(self, value: Any) -> str | dict[str, Any]:
        from apo.mixture import mixture_of

        return mixture_of(value).plain


def trainer_options(config: TrainConfig, *, has_eval: bool, processes: int = 1) -> APOConfig:
    """The trainer's configuration. Raises UserError for an option TRL does not have, or that the recipe says."""
    import dataclasses

    from apo.arguments import IGNORED, APOConfig
    from apo.cache import default_folder
    from apo.mixture import mixture_of

    allowed = {field.name for field in dataclasses.fields(APOConfig)} - set(OWN_KEYS) - set(IGNORED) - set(NOT_OFFERED)
    for key in config.trainer:
        if key in OWN_KEYS:
            raise UserError(f"trainer.{key}: the recipe says it at its top, as {OWN_KEYS[key]!r}; move it there")
        if key in IGNORED:
            raise UserError(
                f"trainer.{key} would be ignored beside objective {mixture_of(config.objective).name!r}; leave it out"
            )
        if key in NOT_OFFERED:
            raise UserError(f"trainer.{key} is not offered by `apo train`; leave it out")
        if key not in allowed:
            near = near_miss(key, allowed) or "; see TRL's DPOConfig and transformers' TrainingArguments"
            raise UserError(f"trainer.{key}: no such option{near}")
    _check_types(config.trainer)
    defaults: dict[str, Any] = {"eval_strategy": "epoch"} if has_eval else {}
    defaults |= {"save_total_limit": 2} if config.guard else {}
    defaults |= _step_of(config, processes)
    objective = mixture_of(config.objective)
    if config.reference == "cached" and objective.needs_reference and not objective.needs_divergence:
        defaults |= {"precompute_ref_log_probs": True, "reference_cache": str(default_folder())}
    try:
        return APOConfig(
            **{**defaults, **config.trainer}, output_dir=config.out, seed=config.seed, beta=config.beta,
            objective=config.objective, weights=config.weights, trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def _step_of(config: TrainConfig, processes: int) -> dict[str, int]:
    """Size and number of the micro-batches of a step of `pairs_per_step` pairs, where the recipe says them."""
    pairs, size = config.pairs_per_step, config.trainer.get("per_device_train_batch_size")
    if pairs is None:
        return {}
    if "gradient_accumulation_steps" in config.trainer:
        raise UserError("trainer.gradient_accumulation_steps follows from pairs_per_step; leave one of them out")
    each, left = divmod(pairs, processes)
    if left:
        raise UserError(f"pairs_per_step: {pairs} cannot be shared out equally to {processes} processes")
    if size is None:
        size = next(size for size in range(min(8, each), 0, -1) if each % size == 0)
    if size < 1 or each % size:
        raise UserError(
            f"pairs_per_step: {pairs} on {processes} process(es) is {each} each, no multiple of "
            f"trainer.per_device_train_batch_size {size}"
        )
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}


def _check_types(options: dict[str, Any]) -> None:
    """TRL takes any value for any option and fails later. Here `learning_rate: fast` fails now."""
    import typing

    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    from apo.arguments import APOConfig

    hints = typing.get_type_hints(APOConfig) | {"fsdp": bool | str}  # transformers says text, and means a switch
    for key, value in options.items():
        try:
            TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"trainer.{key}: {error.errors()[0]['msg']}, found {value!r}") from error
        except PydanticUserError:  # a type only TRL can judge
            continue


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
    rails: Rails | None = None
    processes: int = 1

    @property
    def pairs_per_step(self) -> int:
        """Pairs in an optimizer step, over all processes."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.processes

    def counts(self) -> dict[str, Any]:
        """Pairs (or unpaired rows, and how many are desirable) and drops of both splits, for run.json."""
        splits = {"train": self.train, "eval": self.eval}
        return {name: {**split.size(name), "dropped": split.dropped} for name, split in splits.items() if split}


def plan(config: TrainConfig, processes: int | None = None) -> Plan:
    """Check recipe, model folder, tokenizer and every pair, without loading a weight or writing a file.

    `processes` plans a run of so many, which this need not be.
    """
    from apo.pairs import load_eval, load_train
    from apo.processes import check_launch

    launched = check_launch()
    count = launched if processes is None else processes

    name = models.find(config.model, config.trust_remote_code)
    if name.is_adapter and config.lora:
        raise UserError(f"model {config.model} is an adapter and is trained on as it is; leave `lora` out, or merge it")
    tokenizer = models.load_tokenizer(name)
    train_pairs = load_train(config.dataset, config.seed, config.weights)
    eval_pairs = load_eval(config.dataset, config.eval, config.weights)
    args = trainer_options(config, has_eval=eval_pairs is not None, processes=count)
    if count == launched:
        check_devices(args)
    if config.quantize and (asks_for_fsdp(args) or asks_for_deepspeed(args)):
        raise UserError("quantize: 4-bit weights are whole in every process; leave FSDP and DeepSpeed out")
    if config.quantize and "quantization_config" in (args.model_init_kwargs or {}):
        raise UserError("trainer.model_init_kwargs.quantization_config: the recipe's `quantize` says it; leave one out")
    if eval_pairs is None and args.eval_strategy != "no":
        raise UserError("trainer.eval_strategy is set but there are no held-out pairs; set `eval`, or leave it out")
    ends = models.load_generation_config(name)
    train = _tokenize(train_pairs, "train", tokenizer, ends, args)
    evaluated = _tokenize(eval_pairs, "eval", tokenizer, ends, args) if eval_pairs is not None else None
    if len(train.dataset) < 2:
        raise UserError(
            f"{len(train.dataset)} row(s) are left to train on: {train.dropped.get('too_long', 0):,} are longer than "
            f"max_length {args.max_length}; raise trainer.max_length"
        )
    rails = load_rails(config.guard, tokenizer, ends, models.context_of(name)) if config.guard else None
    steps = _steps(args, len(train.dataset), count)
    return Plan(config, name, tokenizer, args, train, evaluated, steps, rails, count)


@dataclass(frozen=True)
class Estimate:
    """What a checked plan will cost: as it runs on a GPU (True) and on a CPU (False)."""

    jobs: dict[bool, fit.Job]
    machine: fit.Device

    @property
    def here(self) -> fit.Job:
        """The run on the machine it starts on."""
        return self.jobs[self.machine.is_gpu]


def estimate(planned: Plan) -> Estimate | str:
    """The costs of a plan (fit.py), or why they cannot be told."""
    from apo import fit
    from apo.mixture import mixture_of

    config, args = planned.config, planned.args
    machine = fit.this_machine()
    if args.use_cpu and machine.is_gpu:
        return "the run leaves the GPU unused"
    if asks_for_deepspeed(args):
        return "the formulas do not know what DeepSpeed shares out"
    try:
        sizes = fit.sizes_of(planned.name, _lora_of(config))
    except (ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        return str(error)
    reference = ("cached" if args.precompute_ref_log_probs else "online") if (
        mixture_of(config.objective).needs_reference
    ) else None  # fmt: skip
    asked = config.trainer.get("gradient_checkpointing", config.trainer.get("activation_checkpointing"))
    dtype = str((args.model_init_kwargs or {}).get("dtype", "float32"))
    jobs = {
        on_gpu: fit.job_of(
            sizes, planned.train.dataset, args, planned.steps, reference=reference, dtype=dtype,
            mixed=config.trainer.get("bf16", on_gpu) or args.fp16,
            checkpointing=on_gpu if asked is None else asked, on_gpu=on_gpu,
            mismatched=mixture_of(config.objective).needs_divergence, processes=planned.processes,
            sharded=asks_for_fsdp(args), quantized=config.quantize is not None,
        )
        for on_gpu in (True, False)
    }  # fmt: skip
    return Estimate(jobs, machine)


def _lora_of(config: TrainConfig) -> Any:
    """PEFT's configuration of the recipe's `lora`, or None."""
    if config.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules, task_type="CAUSAL_LM",
    )  # fmt: skip


def _tokenize(pairs: Dataset, split: str, tokenizer: Any, generation: Any, args: APOConfig) -> Tokenized:
    from apo.mixture import mixture_of
    from apo.pairs import check_weights
    from apo.tokens import end_ids, tokenize

    if args.weights is not None:
        check_weights(pairs, args.weights, split)
    ends, objective = end_ids(tokenizer, generation), mixture_of(args.objective)
    return tokenize(pairs, tokenizer, args.max_length, ends, split, args.dataset_num_proc, objective)


def _steps(args: APOConfig, pairs: int, processes: int) -> int:
    """Optimizer steps of the run, as the trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = pairs / (args.per_device_train_batch_size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def train(config: TrainConfig, *, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Train what `config` says, or go on from the newest complete checkpoint. Returns the content of run.json; with
    `by`, that of each run, by its folder.

    Under a launcher (torchrun) each process calls this, and the first one writes and tells. Raises UserError before any
    work for everything that is the user's to mend; KeyboardInterrupt after a first Ctrl-C, with a checkpoint saved.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    options = config.trainer
    check_deepspeed(bool(options.get("deepspeed")))
    if config.quantize and (reason := models.why_not_quantized(cpu=_on_cpu(config))):
        raise UserError(reason)
    with joined(cpu=_on_cpu(config), seconds=float(options.get("ddp_timeout", 1800))) as group:
        told = tell if group.is_main else _silent
        return _train(config, group, told) if config.by is None else _train_each(config, group, told)


def _on_cpu(config: TrainConfig) -> bool:
    import torch

    return bool(config.trainer.get("use_cpu")) or not torch.accelerator.is_available()


def _silent(_: str) -> None:
    """What the processes after the first say."""


def _train_each(config: TrainConfig, group: Group, tell: Callable[[str], None]) -> dict[str, Any]:
    """One run after the other, all checked before the first."""
    import gc

    from apo.each import runs_of

    with group.together():
        wanted = runs_of(config, tell)
    group.same(runs=[one.out for one in wanted])
    for one in wanted:
        with group.together():
            status = runs.status_of(Path(one.out), resolved(one))
        if status != "finished":
            _plan_of_all(one, group)
    done = {}
    for one in wanted:
        done[one.out] = _train(one, group, tell)
        gc.collect()  # a trainer and its callbacks hold one another, and the model with them
    return done


def _train(config: TrainConfig, group: Group, tell: Callable[[str], None]) -> dict[str, Any]:
    out = Path(config.out)
    with group.together():
        status = runs.status_of(out, resolved(config))
    group.same(**{f"the run in {out}": status})
    if status == "finished":
        tell(f"{out} is finished; nothing to do")
        return runs.read_run(out)
    planned = _plan_of_all(config, group)
    for note in planned.train.notes:
        tell(f"note: {note}")
    with group.together():
        costs = estimate(planned)
        if not isinstance(costs, str):
            from apo.fit import check_fits

            check_fits(costs.here, costs.machine)
    trainer = build_trainer(planned, group, tell)
    for note in dict.fromkeys(note for notes in group.gather(trainer.notes) for note in notes):
        tell(f"note: {note}")
    found = group.by_main(lambda: _resume(out, planned, status, tell))
    started = time.perf_counter()
    _run(trainer, group, found, out)
    return _finish(trainer, group, out, time.perf_counter() - started)


def _plan_of_all(config: TrainConfig, group: Group) -> Plan:
    """Every process plans; the first before the others, so that these find its tokenised pairs in `datasets`' cache."""
    from apo.pairs import fingerprint

    planned = None
    with group.together():
        if group.is_main:
            planned = plan(config)
    with group.together():
        planned = planned or plan(config)
    group.same(pairs=fingerprint(planned.train.dataset, config.weights), steps=planned.steps)
    return planned


def build_trainer(planned: Plan, group: Group | None = None, tell: Callable[[str], None] = print) -> APOTrainer:
    """The trainer of a checked plan, model loaded, with the checks before the first step done."""
    group = group or Group()
    from transformers import PrinterCallback, ProgressCallback

    from apo.checks import check_before_training
    from apo.mixture import mixture_of
    from apo.monitor import Bar, Interrupt, Recorder, Warner
    from apo.probe import probe_of
    from apo.trainer import APOTrainer
    from apo.watch import Watch

    config, args, watch = planned.config, planned.args, Watch(planned.rails)
    plain = mixture_of(config.objective).plain
    options, args.model_init_kwargs = dict(args.model_init_kwargs or {}), None
    if config.quantize:
        compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(options.get("dtype", "float32"))
        options["quantization_config"] = models.four_bits(compute)
    with group.together():
        model = models.load_model(planned.name, **options)
        models.check_vocabulary(model, planned.tokenizer, planned.name.base)
    try:
        trainer = APOTrainer(
            model=model, args=args, train_dataset=planned.train.dataset, peft_config=_lora_of(config),
            eval_dataset=planned.eval.dataset if planned.eval else None, processing_class=planned.tokenizer,
            callbacks=[Interrupt(group), watch, Recorder(Path(config.out)), Bar(), Warner(plain, tell)],
        )  # fmt: skip
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(" ".join(str(error).split())) from error
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    if config.lora and config.lora.dropout:
        _set_adapter_dropout(trainer.model, config.lora.dropout)
    with group.together():
        check_before_training(trainer)
    watch.begin(trainer, probe_of(trainer, config.probe))
    return trainer


def _set_adapter_dropout(model: Any, p: float) -> None:
    """TRL turns off every dropout (`disable_dropout`), and the adapter's with it; the recipe asks for it."""
    for name, module in model.named_modules():
        if "lora_dropout" in name and hasattr(module, "p"):
            module.p = p


def _resume(out: Path, planned: Plan, status: runs.Status, tell: Callable[[str], None]) -> Path | None:
    """Begin the run's folder, or find what to go on from in it."""
    from apo.checkpoints import find_newest, step_of
    from apo.pairs import fingerprint

    data = {**planned.counts(), "sha256": fingerprint(planned.train.dataset, planned.config.weights)}
    facts = {"steps": planned.steps, "pairs_per_step": planned.pairs_per_step, "processes": planned.processes}
    if status == "new":
        runs.begin(out, resolved(planned.config), data=data, **facts, resumed_from=[])
        return None
    run = runs.read_run(out)
    _check_same_steps(run, planned, out)
    if run["data"]["sha256"] != data["sha256"]:
        raise UserError(f"out: {out} holds a run on other pairs: the dataset has changed since; choose another folder")
    search = find_newest(out)
    for note in search.notes:
        tell(note)
    step = step_of(search.newest) or 0 if search.newest else 0
    tell(f"going on from step {step} of {planned.steps}" if step else "starting over: there is no complete checkpoint")
    runs.drop_metrics_after(out, step if step else -1)
    now = {"recipe": resolved(planned.config), **facts, "resumed_from": [*run["resumed_from"], step]}
    write_json(out / runs.RUN, {**run, **now})
    return search.newest


def _check_same_steps(run: dict[str, Any], planned: Plan, out: Path) -> None:
    """Raises UserError where other processes or micro-batches would make another run of the one that was begun."""
    pairs, processes = run.get("pairs_per_step", planned.pairs_per_step), run.get("processes", planned.processes)
    if pairs != planned.pairs_per_step:
        raise UserError(
            f"out: {out} holds a run of {pairs} pairs a step ({processes} process(es)), and this one would take "
            f"{planned.pairs_per_step} ({planned.processes}); set pairs_per_step: {pairs} and leave "
            "trainer.gradient_accumulation_steps out, or choose another folder"
        )
    if run["steps"] != planned.steps:
        raise UserError(
            f"out: {out} holds a run of {run['steps']} steps and this one would take {planned.steps}: "
            f"trainer.dataloader_drop_last leaves out other pairs on other processes; go on with {processes}"
        )
    random = (planned.config.lora and planned.config.lora.dropout) or not planned.args.disable_dropout
    if processes != planned.processes and random:
        raise UserError(
            f"out: {out} holds a run of {processes} process(es), whose dropout draws other numbers on "
            f"{planned.processes}; go on with {processes}, or begin anew in another folder"
        )


def _run(trainer: APOTrainer, group: Group, checkpoint: Path | None, out: Path) -> None:
    from apo.faults import Stopped, check_weights_finite, kept_words
    from apo.monitor import Bar, Interrupt
    from apo.watch import Watch

    (watch,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watch))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        with group.together():
            if watch.crossed:
                raise Stopped(f"step {trainer.state.global_step}: {watch.crossed}; {kept_words(trainer)}")
            check_weights_finite(trainer)
    except Stopped as stop:
        runs.note_stop(out, trainer.state.global_step, str(stop))
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Bar | Interrupt):
                callback.close()
    stopped = any(isinstance(c, Interrupt) and c.stopping for c in trainer.callback_handler.callbacks)
    if stopped and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")


def _finish(trainer: APOTrainer, group: Group, out: Path, seconds: float) -> dict[str, Any]:
    """Save the model, by all; then its picture, card and finished run.json, by the first process."""
    trainer.save_model(str(out / _FINAL))
    return group.by_main(lambda: _write_results(out, seconds))


_FINAL = ".final"


def _write_results(out: Path, seconds: float) -> dict[str, Any]:
    """Put model, picture, card and the finished run.json in place, in this order: only the last ends the run."""
    from apo.dynamics import read_metrics
    from apo.mixture import title_of
    from apo.plots import draw_dynamics

    final = out / _FINAL
    (final / runs.CARD).unlink(missing_ok=True)  # PEFT's; ours follows
    adapter = (final / models.ADAPTER_CONFIG).exists()
    runs.put_in_place(final, out)
    rows = read_metrics(out / runs.METRICS)
    run = runs.read_run(out)
    recipe = run["recipe"]
    draw_dynamics(
        rows, out / runs.PICTURE, f"{title_of(recipe['objective'])}, beta {recipe['beta']}, {recipe['model']}"
    )
    run |= {"metrics": last_metrics(rows), "seconds": round(seconds, 2), "finished": runs.now()}
    runs.write_card(out, run, adapter=adapter)
    write_json(out / runs.RUN, run)
    return run


def last_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last training line and the last held-out line in one."""
    lines = {prefix: [row for row in rows if f"{prefix}loss" in row] for prefix in ("", "eval_")}
    metrics = {key: value for line in lines.values() if line for key, value in line[-1].items()}
    return {key: value for key, value in metrics.items() if key not in ("step", "epoch")}
