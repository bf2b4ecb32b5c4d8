"""Run pilots: evidence, matched rates, short training runs, answers, and the choice. Each part can resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from apo.advice.rule import suggest_learning_rate
from apo.advice.run import run as run_advice
from apo.data.sources import hash_pairs
from apo.evaluation.config import Outcome, redacted
from apo.evaluation.intervals import mean_with_interval
from apo.models.load import hash_model_files
from apo.monitoring.result_plots import draw_pilots
from apo.pilot.decision import PilotVerdict, decide
from apo.pilot.matching import (
    MAX_TRIALS,
    WARM_UP,
    WINDOW,
    free_memory,
    matched_rates,
    matching_config,
    next_rate,
    run_trials,
)
from apo.pilot.metric import BASE, METRICS, Gains, measure_gains, metric_name
from apo.pilot.plan import FOLDER, PICTURE, RATES, RESULT, PilotPlan, pilot_name
from apo.pilot.tables import pilot_lines, pilot_table
from apo.run_dir.checkpoints import checkpoints
from apo.run_dir.files import RUN, read_run, redacted_recipe, today
from apo.sweep.grid import SweepRun, check_runs
from apo.sweep.processes import train_runs, visible_devices
from apo.sweep.results import summarize
from apo.training.config import TrainConfig
from apo.training.plan import plan
from clair.core.errors import UserError
from clair.core.files import read_json, write_json
from clair.core.out_folder import check_unchanged
from clair.core.progress import progress
from clair.core.provenance import provenance
from clair.core.recipe import changed_keys, load_recipe, resolved
from clair.core.statistics import clustered_mean
from clair.pipeline.output_dir import lock_output

if TYPE_CHECKING:
    from rich.table import Table

    from apo.advice.config import AdviceInputs

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, repr=False)
class PilotOutcome(Outcome):
    """How pilots ended. `result` is the content of pilot.json; `refused_by` are lines of evidence against training."""

    result: Mapping[str, Any] | None = None
    refused_by: Sequence[str] = ()

    @property
    def headline(self) -> str | None:
        """The choice in one line; None if the run ended early."""
        return next(iter(self.lines()), None)

    def lines(self) -> list[str]:
        """The choice, its reason and what is uncertain, one per line."""
        return list(pilot_lines(self.result)) if self.result else list(self.refused_by)

    def table(self) -> Table | None:
        """All pilots with their gains; None if there were none."""
        return pilot_table(self.result) if self.result else None


def run(planned: PilotPlan, *, inputs: AdviceInputs | None = None, log: Log = lambda _: None) -> PilotOutcome:
    """Collect the evidence, run the pilots that it does not refuse, and write pilot.json and pilot.png.

    Raises UserError for what the user can correct, and KeyboardInterrupt after Ctrl-C; the same call goes on.
    """
    config, out = planned.config, planned.out
    without_pilots = config.model_copy(update={"pilot": None, "difference": config.sample_difference})
    evidence = run_advice(without_pilots, inputs=inputs, log=log)
    if evidence.result is None:
        return PilotOutcome(
            out=out, failed=evidence.failed, first_failure=evidence.first_failure, stopped=evidence.stopped
        )
    advice = evidence.result
    if advice["refused"]:
        return PilotOutcome(out=out, refused_by=evidence.lines())
    if metric_name(config) == "judge" and not advice["judge"]["used"]:
        reason = advice["judge"]["distrust"]
        raise UserError(f"the judge cannot choose among pilots: {reason}; give another one, a checker or a benchmark")
    with lock_output(out):
        order = [name for name in advice["pilot_order"] if name in planned.pilot.objectives]
        order += [name for name in planned.pilot.objectives if name not in order]
        trials, rates = match_rates(planned, order, int(advice["evidence"]["parameters"]), log)
        runs = pilot_runs(planned, order, rates)
        failed = _train(runs, planned, log)
        completed = [run for run in runs if run.name not in failed and stop_reason(run) is None]
        if not completed:
            reasons = "; ".join(f"{run.name}: {failed.get(run.name) or stop_reason(run)}" for run in runs[:2])
            raise UserError(
                f"no pilot came to its end ({reasons}); lower pilot.displacements, raise pilot.max_kl, or look into "
                f"{out}/{FOLDER}"
            )
        models = {BASE: str(config.model.path), **{run.name: str(run.out) for run in completed}}
        gains = measure_gains(config, models, planned.prompts, log)
        if early := PilotOutcome.early(out, gains.stopped, gains.failures):
            return early
        if len(set(gains.clusters)) < 2:
            raise UserError(
                f"{len(set(gains.clusters))} prompt has a score of every model; two are needed, and many more"
            )
        objectives = {run.name: str(run.values["objective"]) for run in runs}
        unit = " of the checker's score" if metric_name(config) == "checker" else ""
        verdict = decide(gains.by_pilot, gains.clusters, objectives, config.difference, unit)
        result = _result(planned, runs, failed, trials, gains, verdict, advice)
        write_json(out / RESULT, result)
        draw_pilots(result, out / PICTURE)
    return PilotOutcome(out=out, result=result)


# ---- rates


def match_rates(
    planned: PilotPlan, order: Sequence[str], parameters: int, log: Log
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """The trials of each objective and the rate of each pilot, from rates.json or made now.

    New displacements continue the trials; the rates of earlier ones stay. Raises UserError if the file is of another
    recipe, other pairs or another model.
    """
    file = planned.out / RATES
    base = load_recipe(TrainConfig, planned.pilot.recipe, planned.overrides)
    saved = read_json(file) if file.is_file() else {}
    state = {"format": 1, "day": today(), "trials": {}, "rates": {}, **saved}
    settings = _matching_settings(base, state["day"])
    changed = changed_keys(state.setdefault("settings", settings), settings)
    check_unchanged(str(planned.out), "pilots of another recipe", changed)
    first = float(base.trainer.get("learning_rate") or suggest_learning_rate(parameters) * (10 if base.lora else 1))
    for objective in order:
        names = {target: pilot_name(objective, target) for target in planned.pilot.displacements}
        targets = [target for target, name in names.items() if name not in state["rates"]]
        if not targets:
            continue
        earlier = [(rate, moved) for rate, moved in state["trials"].get(objective, [])]
        if next_rate(earlier, targets, first, len(earlier) + MAX_TRIALS) is not None:
            config = base.model_copy(update={"objective": objective})
            config = matching_config(config, first, planned.out / FOLDER / ".matching")
            log(f"matching the learning rate of {objective}")
            with progress(f"steps at trial rates, {objective}", int(config.trainer["max_steps"])) as bar:
                state["trials"][objective] = run_trials(config, targets, bar.advance, earlier)
            free_memory()
        rates = matched_rates({objective: state["trials"][objective]}, targets)
        state["rates"] |= {pilot_name(*cell): rate for cell, rate in rates.items()}
        write_json(file, state)
    return state["trials"], state["rates"]


def _matching_settings(base: TrainConfig, day: str) -> dict[str, Any]:
    """What matched rates depend on: recipe, pairs of both splits, and model. `day` is the date in chat templates."""
    ignored = ("out", "guard", "eval_rows", "probe", "samples", "objective")
    recipe = {key: value for key, value in redacted_recipe(resolved(base)).items() if key not in ignored}
    pairs = plan(base, day=day)
    return {
        "recipe": recipe,
        "pairs": pairs.pairs_hash,
        "held_out": hash_pairs(pairs.eval.dataset) if pairs.eval else None,
        "model_sha256": hash_model_files(pairs.name),
    }


def pilot_runs(planned: PilotPlan, order: Sequence[str], rates: Mapping[str, float]) -> list[SweepRun]:
    """The pilots at their matched rates, checked. Raises UserError as `apo sweep` does."""
    cells = product(order, planned.pilot.displacements)
    return check_runs([planned.run(*cell, rates[pilot_name(*cell)]) for cell in cells])


# ---- training


def _train(runs: Sequence[SweepRun], planned: PilotPlan, log: Log) -> dict[str, str]:
    """Train the pilots that have neither ended nor been stopped by the guard. Returns the errors of failed ones."""
    waiting = [run for run in runs if run.status != "finished" and stop_reason(run) is None]
    finished = len(runs) - len(waiting)
    log(f"{len(runs)} pilots, {finished} of them done; messages of each in {planned.out / FOLDER}/NAME.log")
    (planned.out / FOLDER).mkdir(exist_ok=True)
    arguments = [planned.pilot.recipe, *(word for override in planned.overrides for word in ("--set", override))]
    with progress("pilots", len(runs), initial=finished) as bar:
        errors = train_runs(waiting, arguments, visible_devices(), bar) if waiting else {}
    stopped = {run.name for run in runs if stop_reason(run)}
    for run in runs:
        if run.name not in errors or run.name in stopped:
            for checkpoint in checkpoints(run.out):
                shutil.rmtree(checkpoint)
    return {name: error for name, error in errors.items() if name not in stopped}


def stop_reason(run: SweepRun) -> str | None:
    """Why the guard, with the limits that it has now, stopped a pilot, with the step; None if it did not."""
    if not (run.out / RUN).is_file():
        return None
    guard = resolved(run.config)["guard"]
    by_guard = [stop for stop in read_run(run.out).get("stopped", []) if stop.get("guard") == guard]
    return f"{by_guard[-1]['why'].partition('; ')[0]}" if by_guard else None


# ---- the result


def _result(
    planned: PilotPlan,
    runs: Sequence[SweepRun],
    failed: Mapping[str, str],
    trials: Mapping[str, Sequence[Any]],
    gains: Gains,
    verdict: PilotVerdict,
    advice: Mapping[str, Any],
) -> dict[str, Any]:
    config = planned.config
    completed = [run for run in runs if run.name in gains.by_pilot]
    held_out = {entry["name"]: entry for entry in summarize(completed, {})["runs"]}
    entries = []
    for run in runs:
        objective, displacement = run.name.split("-", 1)  # a displacement may be 5e-05
        gain = gains.by_pilot.get(run.name)
        entries.append(
            {
                "name": run.name,
                "objective": objective,
                "displacement": float(displacement),
                "learning_rate": run.values["trainer.learning_rate"],
                "full_learning_rate": planned.full_rate(run.values["trainer.learning_rate"]),
                "steps": run.steps,
                "stopped": stop_reason(run),
                "failed": failed.get(run.name),
                "gain": mean_with_interval(gain, gains.clusters, clustered_mean) if gain else None,
                "right": held_out[run.name]["right"] if gain else None,
            }
        )
    matching = sum(WARM_UP + WINDOW * len(objective_trials) for objective_trials in trials.values())
    trained = sum(_steps_trained(run) for run in runs)
    best = next(run for run in runs if run.name == verdict.best)
    full_rate = planned.full_rate(best.values["trainer.learning_rate"])
    overrides = [f"objective={best.values['objective']}", f"trainer.learning_rate={full_rate}"]
    return {
        "format": 1,
        "verdict": asdict(verdict),
        "recommended": overrides if verdict.choice else None,
        "best_guess": overrides,
        "recipe": planned.pilot.recipe,
        "beta": planned.full.beta,
        "metric": metric_name(config),
        "meaning": METRICS[metric_name(config)],
        "scale": 1 if metric_name(config) == "checker" else 100,
        "rows": len(gains.clusters),
        "prompts": len(set(gains.clusters)),
        "left_out": gains.left_out,
        "pilots": entries,
        "trials": dict(trials),
        "cost": {
            "full_steps": planned.full_steps,
            "matching_steps": matching,
            "pilot_steps": trained,
            "share": planned.share(matching, trained),
        },
        "evidence": advice["advice"],
        "settings": redacted(config),
        **provenance(),
    }


def _steps_trained(run: SweepRun) -> int:
    stops = read_run(run.out).get("stopped", []) if (run.out / RUN).is_file() else []
    return int(stops[-1]["step"]) if stops and stop_reason(run) else run.steps
