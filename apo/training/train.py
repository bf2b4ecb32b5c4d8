"""train(): from one recipe to one trained model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.distributed.deepspeed import unsharded_loading
from apo.distributed.launch import Group, check_deepspeed, join_processes
from apo.models.load import (
    check_vocabulary,
    load_model,
    nf4_config,
    quantization_problem,
)
from apo.run_dir.checkpoints import checkpoint_step
from apo.run_dir.files import (
    HELD_OUT,
    Status,
    describe_counts,
    read_run,
    record_stop,
    run_status,
    template_day,
)
from apo.training.config import TrainConfig, lora_config
from apo.training.plan import Plan, estimate, plan, plan_run
from apo.training.run_json import FINAL, begin_or_resume, finish_run, run_facts
from clair.core.errors import UserError, one_line
from clair.core.files import write_atomically
from clair.core.recipe import resolved
from clair.pipeline.output_dir import LOCK, lock_output

if TYPE_CHECKING:
    from apo.training.trainer import APOTrainer


def train(config: TrainConfig, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train the recipe `config`, or resume from its newest complete checkpoint. Returns the content of run.json; with
    `by`, that of each run, by folder.

    Under a launcher (torchrun) every process calls this; rank 0 writes files and calls `log` with each message. Raises
    UserError before any work for a mistake in recipe, data or machine, and KeyboardInterrupt after a first Ctrl-C, with
    a checkpoint saved.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    options = config.trainer
    check_deepspeed(bool(options.get("deepspeed")))
    if config.quantize and (reason := quantization_problem()):
        raise UserError(reason)
    with join_processes(cpu=_on_cpu(config), seconds=float(options.get("ddp_timeout", 1800))) as group:
        log = log if group.is_main else _silent
        return _train(config, group, log) if config.by is None else _train_each(config, group, log)


def _on_cpu(config: TrainConfig) -> bool:
    import torch

    return bool(config.trainer.get("use_cpu")) or not torch.accelerator.is_available()


def _silent(_: str) -> None:
    """Log nothing: the `log` of all processes but rank 0."""


def _train_each(config: TrainConfig, group: Group, log: Callable[[str], None]) -> dict[str, Any]:
    """Train one run after another; all are checked before the first starts."""
    import gc

    from apo.training.by_group import expand_runs

    with group.raise_on_all():
        configs = expand_runs(config, log)
    group.check_equal(runs=[run.out for run in configs])
    for run in configs:
        _plan_unless_finished(run, group)
    results = {}
    for run in configs:
        log(f"run: {run.out}")
        results[run.out] = _train(run, group, log)
        gc.collect()  # trainer and callbacks refer to each other, and keep the model alive
    return results


def _train(config: TrainConfig, group: Group, log: Callable[[str], None]) -> dict[str, Any]:
    out = Path(config.out)
    planned = _plan_unless_finished(config, group)
    if planned is None:
        log(f"{out} is finished; nothing to do")
        return read_run(out)
    with ExitStack() as stack:
        with group.raise_on_all():
            if group.is_main:
                stack.enter_context(_locked_folder(out))
        status = _status(config, group)  # another process may have finished the run in the meantime
        if status == "finished":
            log(f"{out} was finished by another process just now; nothing to do")
            return read_run(out)
        return _train_planned(planned, status, group, log)


@contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Lock the run's folder for this process. Removes the folder if the run did not start."""
    with lock_output(out):
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            if not any(out.iterdir()):
                out.rmdir()


def _status(config: TrainConfig, group: Group) -> Status:
    with group.raise_on_all():
        status = run_status(Path(config.out), resolved(config))
    group.check_equal(**{f"the run in {config.out}": status})
    return status


def _train_planned(planned: Plan, status: Status, group: Group, log: Callable[[str], None]) -> dict[str, Any]:
    """Train in a folder that this process has locked."""
    out = Path(planned.config.out)
    facts = group.broadcast_from_main(lambda: run_facts(planned, status))
    for split, count in planned.counts().items():
        log(f"{split}: {describe_counts(count)}")
    log(f"steps: {planned.steps_text}")
    for note in planned.train.notes:
        log(f"note: {note}")
    with group.raise_on_all():
        costs = estimate(planned)
        if not isinstance(costs, str):
            from apo.cost.fitting import check_fits

            check_fits(costs.here, costs.machine)
    trainer = build_trainer(planned, group, log)
    for note in dict.fromkeys(note for notes in group.gather(trainer.notes) for note in notes):
        log(f"note: {note}")
    if trainer.reference_computed:
        pairs = sum(len(split.dataset) for split in (planned.train, planned.eval) if split)
        computed = sum(sum(counts.values()) for counts in group.gather(trainer.reference_computed))
        cached = f", {pairs - computed:,} kept from an earlier run" if computed < pairs else ""
        log(f"reference log-probs: {computed:,} computed{cached}")
    checkpoint = group.broadcast_from_main(lambda: begin_or_resume(planned, facts, status, log))
    started = time.perf_counter()
    _run(trainer, group, checkpoint, out)
    return _finish(trainer, planned, group, time.perf_counter() - started)


def _plan_unless_finished(config: TrainConfig, group: Group) -> Plan | None:
    """The plan of a run; None if it is finished. Raises UserError if it is finished on other pairs or another model."""
    if _status(config, group) == "finished":
        group.broadcast_from_main(lambda: plan_run(config)[1])
        return None
    return _plan_on_all(config, group)


def _plan_on_all(config: TrainConfig, group: Group) -> Plan:
    """Plan on every process, rank 0 first, so that the others read its tokenized pairs from `datasets`' cache."""
    planned = None
    # Rank 0 decides: midnight may pass between two processes.
    day = group.broadcast_from_main(lambda: template_day(Path(config.out)))
    with group.raise_on_all():
        if group.is_main:
            planned = plan(config, day=day)
    with group.raise_on_all():
        planned = planned or plan(config, day=day)
    group.check_equal(pairs=planned.pairs_hash, steps=planned.steps)
    return planned


def build_trainer(planned: Plan, group: Group | None = None, log: Callable[[str], None] = print) -> APOTrainer:
    """The trainer of a plan, with the model loaded and the checks before the first step passed.

    Raises UserError.
    """
    group = group or Group()
    from transformers import PrinterCallback, ProgressCallback

    from apo.losses.mixture import resolve_mixture
    from apo.monitoring.callbacks import DiagnosisCallback, InterruptCallback, MetricsCallback, ProgressBarCallback
    from apo.monitoring.inspection_callback import InspectionCallback
    from apo.monitoring.sample_answers import build_sample_answers
    from apo.monitoring.token_diagnostics import build_token_diagnostics
    from apo.training.preflight import check_before_training
    from apo.training.trainer import APOTrainer

    config, args, inspection = planned.config, planned.args, InspectionCallback(planned.guard_set)
    plain = resolve_mixture(config.objective).spec
    options, args.model_init_kwargs = args.loading_options(), None
    if config.quantize:
        compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(options.get("dtype", "float32"))
        options["quantization_config"] = nf4_config(compute)
        if args.device.type == "cpu":
            options["device_map"] = {"": "cpu"}  # transformers would take a GPU that the recipe leaves unused
    with group.raise_on_all(), unsharded_loading():
        model = load_model(planned.name, **options)
        check_vocabulary(model, planned.tokenizer, planned.name.base)
    try:
        trainer = APOTrainer(
            model=model,
            args=args,
            train_dataset=planned.train.dataset,
            peft_config=lora_config(config),
            eval_dataset=planned.eval.dataset if planned.eval else None,
            processing_class=planned.tokenizer,
            log=_silent,
            callbacks=[
                InterruptCallback(group),
                inspection,
                MetricsCallback(Path(config.out)),
                ProgressBarCallback(),
                DiagnosisCallback(plain, log),
            ],
        )
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(one_line(error)) from error
    for callback in (PrinterCallback, ProgressCallback):  # replaced by ProgressBarCallback
        trainer.remove_callback(callback)
    if config.lora and config.lora.dropout:
        _set_adapter_dropout(trainer.model, config.lora.dropout)
    with group.raise_on_all():
        check_before_training(trainer)
    samples = build_sample_answers(trainer, planned.tokenizer, config.samples, Path(config.out))
    diagnostics = build_token_diagnostics(trainer, config.probe)
    inspection.begin(trainer, diagnostics, samples, planned.held_out_groups())
    return trainer


def _set_adapter_dropout(model: Any, p: float) -> None:
    """Set the adapter's dropout again: TRL's `disable_dropout` turns off every dropout of the model."""
    for name, module in model.named_modules():
        if "lora_dropout" in name and hasattr(module, "p"):
            module.p = p


def _run(trainer: APOTrainer, group: Group, checkpoint: Path | None, out: Path) -> None:
    from apo.monitoring.callbacks import InterruptCallback, ProgressBarCallback
    from apo.monitoring.failures import TrainingStopped, check_weights_finite, checkpoint_hint
    from apo.monitoring.inspection_callback import InspectionCallback

    (inspection,) = (
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, InspectionCallback)
    )
    trainer.verified_checkpoint = checkpoint
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        with group.raise_on_all():
            if inspection.violation:
                change = "lower trainer.learning_rate, or allow more and run the same command again"
                raise TrainingStopped(
                    f"step {trainer.state.global_step}: {inspection.violation}; {change}; {checkpoint_hint(trainer)}"
                )
            check_weights_finite(trainer)
    except TrainingStopped as stop:
        record_stop(out, trainer.state.global_step, str(stop), by_guard=inspection.violation is not None)
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBarCallback | InterruptCallback):
                callback.close()
    stopped = any(isinstance(c, InterruptCallback) and c.stopping for c in trainer.callback_handler.callbacks)
    if stopped and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")


def _finish(trainer: APOTrainer, planned: Plan, group: Group, seconds: float) -> dict[str, Any]:
    """Save the model, on all processes; then its plot, card and finished run.json, on rank 0."""
    from apo.monitoring.failures import stop_on_write_error
    from apo.monitoring.held_out import held_out_rows

    out, held_out = Path(planned.config.out), planned.config.eval_rows
    logratios = trainer.held_out_logratios() if held_out else []
    with stop_on_write_error(trainer, "the trained model"):
        trainer.save_model(str(out / FINAL))
        if held_out and group.is_main:
            pairs: Any = trainer.eval_dataset
            lines = (json.dumps(row) + "\n" for row in held_out_rows(pairs, logratios))
            write_atomically(out / HELD_OUT, "".join(lines))
    state, best = trainer.state, None
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        best = checkpoint_step(Path(state.best_model_checkpoint))
    return group.broadcast_from_main(lambda: finish_run(out, seconds, best, is_best=best == state.best_global_step))
