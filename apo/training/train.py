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
    ADAPTER_CONFIG,
    check_vocabulary,
    hash_model_files,
    load_model,
    nf4_config,
    quantization_problem,
)
from apo.monitoring.prediction import right_order
from apo.run_dir.files import (
    CARD,
    HELD_OUT,
    METRICS,
    PICTURE,
    PREDICTION,
    RUN,
    Status,
    describe_counts,
    move_files,
    now,
    read_log,
    read_run,
    record_stop,
    redacted_recipe,
    run_status,
    template_day,
    truncate_logs,
    write_card,
    write_new_run,
)
from apo.training.config import TrainConfig, lora_config
from apo.training.plan import Plan, estimate, plan
from clair.core.errors import UserError, one_line
from clair.core.files import content_hash, write_atomically, write_json
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
        with group.raise_on_all():
            status = run_status(Path(run.out), resolved(run))
        if status != "finished":
            _plan_on_all(run, group)
    results = {}
    for run in configs:
        log(f"run: {run.out}")
        results[run.out] = _train(run, group, log)
        gc.collect()  # trainer and callbacks refer to each other, and keep the model alive
    return results


def _train(config: TrainConfig, group: Group, log: Callable[[str], None]) -> dict[str, Any]:
    out = Path(config.out)
    if _status(config, group) == "finished":
        log(f"{out} is finished; nothing to do")
        return read_run(out)
    planned = _plan_on_all(config, group)
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
    facts = group.broadcast_from_main(lambda: _facts(planned, status))
    for split, count in planned.counts().items():
        log(f"{split}: {describe_counts(count)}")
    log(f"steps: {planned.steps_text}")
    for note in planned.train.notes:
        log(f"note: {note}")
    with group.raise_on_all():
        costs = estimate(planned)
        if not isinstance(costs, str):
            from apo.cost.memory import check_fits

            check_fits(costs.here, costs.machine)
    trainer = build_trainer(planned, group, log)
    for note in dict.fromkeys(note for notes in group.gather(trainer.notes) for note in notes):
        log(f"note: {note}")
    if trainer.reference_computed:
        pairs = sum(len(split.dataset) for split in (planned.train, planned.eval) if split)
        computed = sum(sum(counts.values()) for counts in group.gather(trainer.reference_computed))
        cached = f", {pairs - computed:,} kept from an earlier run" if computed < pairs else ""
        log(f"reference log-probs: {computed:,} computed{cached}")
    checkpoint = group.broadcast_from_main(lambda: _resume(planned, facts, status, log))
    started = time.perf_counter()
    _run(trainer, group, checkpoint, out)
    return _finish(trainer, planned, group, time.perf_counter() - started)


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
    group.check_equal(pairs=_hash_pairs(planned), steps=planned.steps)
    return planned


def _hash_pairs(planned: Plan) -> str:
    from apo.data.sources import hash_pairs

    return hash_pairs(planned.train.dataset, planned.config.weights, planned.args.soft_prompt)


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


def _facts(planned: Plan, status: Status) -> dict[str, Any]:
    """The entries of run.json on pairs, steps and model. Raises UserError if they differ from those of the old run."""
    out = Path(planned.config.out)
    facts = {
        "data": {**planned.counts(), "sha256": _hash_pairs(planned)},
        "model_sha256": hash_model_files(planned.name),
        "steps": planned.steps,
        "pairs_per_step": planned.pairs_per_step,
        "processes": planned.processes,
        "day": planned.day,
    }
    if planned.prediction and planned.prediction.get("model_sha256") != facts["model_sha256"]:
        raise UserError(
            f"prediction: it is of {planned.prediction.get('model')}, whose files differ from those of "
            f"{planned.config.model}; run `apo distinguish` on the model that is trained"
        )
    if status == "new":
        return facts
    run = read_run(out)
    _check_same_steps(run, planned, out)
    if run["data"]["sha256"] != facts["data"]["sha256"]:
        raise UserError(f"out: {out} holds a run on other pairs: the dataset has changed since; choose another folder")
    if run.get("model_sha256", facts["model_sha256"]) != facts["model_sha256"]:
        raise UserError(
            f"out: {out} holds a run on another model: the files of {planned.config.model} have changed since; bring "
            "the old ones back, or choose another folder"
        )
    return facts


def _resume(planned: Plan, facts: dict[str, Any], status: Status, log: Callable[[str], None]) -> Path | None:
    """Write the run.json of a new run, or return the checkpoint to resume from and update run.json and metrics."""
    from apo.run_dir.checkpoints import checkpoint_step, find_newest_checkpoint

    out = Path(planned.config.out)
    if status == "new":
        if planned.prediction:
            write_json(out / PREDICTION, planned.prediction)
        write_new_run(out, resolved(planned.config), **facts, resumed_from=[])
        return None
    run = read_run(out)
    search = find_newest_checkpoint(out)
    for note in search.notes:
        log(note)
    step = checkpoint_step(search.newest) or 0 if search.newest else 0
    log(f"going on from step {step} of {planned.steps}" if step else "starting over: there is no complete checkpoint")
    truncate_logs(out, step if step else -1)
    now = {
        "recipe": redacted_recipe(resolved(planned.config)),
        **facts,
        "resumed_from": [*run["resumed_from"], step],
    }
    write_json(out / RUN, {**run, **now})
    return search.newest


def _check_same_steps(run: dict[str, Any], planned: Plan, out: Path) -> None:
    """Raises UserError if other processes or micro-batches would change the optimizer steps of the run."""
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
        record_stop(out, trainer.state.global_step, str(stop))
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

    out, held_out = Path(planned.config.out), planned.config.eval_rows
    logratios = trainer.held_out_logratios() if held_out else []
    with stop_on_write_error(trainer, "the trained model"):
        trainer.save_model(str(out / _FINAL))
        if held_out and group.is_main:
            _write_held_out(out, trainer.eval_dataset, logratios)
    return group.broadcast_from_main(lambda: _write_results(out, seconds))


_FINAL = ".final"


def _write_held_out(out: Path, pairs: Any, logratios: list[tuple[float, float, float, float]]) -> None:
    """Write held_out.jsonl: `right` is 1 if the chosen answer has the larger reward, and 1/2 for a tie."""
    rows = []
    for index, (pair, (chosen, rejected, rounding, _)) in enumerate(zip(pairs, logratios, strict=True)):
        right = right_order(chosen, rejected, rounding)
        prompt = content_hash(list(pair["prompt_ids"]))[:16]
        row = {"id": str(pair.get("id", index)), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append(json.dumps({**row, "right": right}) + "\n")
    write_atomically(out / HELD_OUT, "".join(rows))


def _write_results(out: Path, seconds: float) -> dict[str, Any]:
    """Move model, plot, card and the finished run.json into place, in this order: only the last ends the run."""
    from apo.losses.mixture import objective_title
    from apo.monitoring.plots import draw_dynamics

    final = out / _FINAL
    (final / CARD).unlink(missing_ok=True)  # written by PEFT, replaced below
    adapter = (final / ADAPTER_CONFIG).exists()
    move_files(final, out)
    rows = read_log(out / METRICS)
    run = read_run(out)
    recipe = run["recipe"]
    draw_dynamics(
        rows, out / PICTURE, f"{objective_title(recipe['objective'])}, beta {recipe['beta']}, {recipe['model']}"
    )
    run |= {"metrics": last_metrics(rows), "seconds": round(seconds, 2), "finished": now()}
    write_card(out, run, adapter=adapter)
    write_json(out / RUN, run)
    return run


def last_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last training line and the last held-out line, merged."""
    lines = {prefix: [row for row in rows if f"{prefix}loss" in row] for prefix in ("", "eval_")}
    metrics = {key: value for line in lines.values() if line for key, value in line[-1].items()}
    return {key: value for key, value in metrics.items() if key not in ("step", "epoch")}
