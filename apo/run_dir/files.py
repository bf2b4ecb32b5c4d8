"""The folder of a training run: its files, their formats, and whether a run can start or resume in it.

model.safetensors or adapter_model.safetensors, config, generation config, tokenizer     the trained model
run.json          resolved recipe, versions, counts with drops, final metrics, seconds
metrics.jsonl     one line per logging step
samples.jsonl     answers to the same few prompts at each inspection
held_out.jsonl    with `eval_rows`: the final rewards of each held-out pair
prediction.json   with `prediction`: what `apo distinguish` predicted, as it stood before the first step
dynamics.png      chosen and rejected, reward and log-prob, over training
README.md         the model card
checkpoint-STEP/  the state from which a stopped run resumes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from apo.losses.mixture import objective_title
from clair.core.errors import UserError
from clair.core.files import write_atomically, write_json
from clair.core.out_folder import ANOTHER_RUN, check_out_folder, check_unchanged
from clair.core.provenance import provenance
from clair.core.recipe import apply_overrides, changed_keys
from clair.core.urls import without_secrets
from clair.storage.location import local

RUN = "run.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
HELD_OUT = "held_out.jsonl"
PREDICTION = "prediction.json"
PICTURE = "dynamics.png"
CARD = "README.md"

_LAYOUT = ("pairs_per_step", "trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
"""Keys that may change within a run if the pairs per step stay the same, which train.py checks."""
Status = Literal["new", "unfinished", "finished"]
MAY_CHANGE = (
    "out",
    "reference",
    "guard",
    "eval_rows",
    "probe",
    "samples",
    "trainer.pack_tokens",
    "trainer.gradient_checkpointing",
)
"""Keys of a recipe (and below them) that do not affect the trained weights: a run may resume with new values."""


def run_status(out: Path, recipe: Mapping[str, Any]) -> Status:
    """The status in `out` of the run of this `recipe` (resolved).

    Raises UserError if `out` holds something else: the run of another recipe, or files that belong to no run.
    """
    local(out)
    check_out_folder(out, "run of `apo train`", [RUN])
    if not (out / RUN).exists():
        return "new"
    run = read_run(out)
    mutable = (*MAY_CHANGE, *(_LAYOUT if "pairs_per_step" in run else ()))
    keys = changed_keys(redacted_recipe(run["recipe"]), redacted_recipe(recipe))
    changed = [key for key in keys if not key.startswith(mutable)]
    check_unchanged(str(out), ANOTHER_RUN, changed, ", or delete this folder")
    return "finished" if run.get("finished") else "unfinished"


def read_run(out: Path) -> dict[str, Any]:
    """The run.json of a folder. Raises UserError if it cannot be read."""
    if not (out / RUN).is_file():
        raise UserError(f"{out} holds no run of `apo train` (no {RUN}); give the folder that a recipe's `out` names")
    try:
        run = json.loads((out / RUN).read_text("utf-8"))
        run["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / RUN} is not a readable run.json; choose another folder") from error
    return run


def template_day(out: Path) -> str:
    """The date (YYYY-MM-DD) that chat templates write as today's: the day on which the run in `out` first started, or
    today for a new run. So a run that resumes on another day has the same token ids.

    Raises UserError if the run.json cannot be read.
    """
    day = read_run(out).get("day") if (out / RUN).exists() else None
    if day is None:
        return today()
    try:
        return date.fromisoformat(day).isoformat()
    except (TypeError, ValueError) as error:
        raise UserError(f"{out / RUN}: day is {day!r}; a date as YYYY-MM-DD needed") from error


def write_new_run(out: Path, recipe: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Write the run.json of a new run, and return it."""
    run = {"recipe": redacted_recipe(recipe), "provenance": provenance(), "started": now(), **facts}
    write_json(out / RUN, run)
    return run


def redacted_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the secrets that trainer options can contain, such as tokens."""
    return {**recipe, "trainer": without_secrets(recipe.get("trainer") or {})}


def redacted_override(override: str) -> str:
    """The `--set` argument of a recipe without the secrets that trainer options can contain."""
    values = apply_overrides({}, [override])
    value: Any = redacted_recipe(values)
    if values.get("trainer", {}) == value["trainer"]:
        return override
    key = override.partition("=")[0]
    for part in key.split("."):
        value = value[part]
    return f"{key}={json.dumps(value)}"


def now() -> str:
    """The current time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def today() -> str:
    """The date by this machine's clock, as transformers' chat templates take it."""
    return datetime.now().date().isoformat()


def record_stop(out: Path, step: int, reason: str, *, by_guard: bool = False) -> None:
    """Record in run.json why training stopped early, and the guard if it stopped it."""
    if (out / RUN).exists():
        run = read_run(out)
        stop = {"step": step, "why": reason, "at": now(), **({"guard": run["recipe"]["guard"]} if by_guard else {})}
        write_json(out / RUN, {**run, "stopped": [*run.get("stopped", []), stop]})


def append_log(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines, in one write, so that a killed process leaves at most its last line incomplete."""
    lines = "".join(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n" for row in rows)
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, lines.encode())
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def truncate_logs(out: Path, step: int) -> None:
    """Remove the lines of steps that are about to be trained again."""
    for file in (out / METRICS, out / SAMPLES):
        if file.exists():
            rows = [row for row in read_log(file) if row["step"] <= step]
            write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def move_files(folder: Path, out: Path) -> None:
    """Move every file of `folder` into `out`, by one rename each, and remove the folder."""
    for file in sorted(folder.iterdir()):
        os.replace(file, out / file.name)
    shutil.rmtree(folder)


def describe_size(count: Mapping[str, Any]) -> str:
    """The size of a split of run.json as text: `24 pairs`, `24 unpaired rows (16 desirable)`."""
    if "pairs" in count:
        return f"{count['pairs']:,} pairs"
    return f"{count['rows']:,} unpaired rows ({count['desirable']:,} desirable)"


def describe_counts(count: Mapping[str, Any]) -> str:
    """The size of a split and its dropped rows as text: `14 pairs, 2 left out (too long)`."""
    left_out = "".join(f", {n:,} left out ({reason.replace('_', ' ')})" for reason, n in count["dropped"].items())
    return describe_size(count) + left_out


def describe_step(run: Mapping[str, Any]) -> str:
    """The step of the model and its metrics as text: `the last step`, `step 40, the best of 8 evaluations`."""
    if not (best := run.get("best")):
        return "the last step"
    count = best["evaluations"]
    return f"step {best['step']:,}, the best {f'of {count:,} evaluations' if count else 'checkpoint'}"


def describe_steps(run: Mapping[str, Any]) -> str:
    """The steps of a run as text: `40 steps`, `40 steps (model of step 20, the best of 8 evaluations)`."""
    return f"{run['steps']:,} steps" + (f" (model of {describe_step(run)})" if run.get("best") else "")


def write_card(out: Path, run: Mapping[str, Any], *, adapter: bool) -> None:
    """Write the model card of a run's folder."""
    write_atomically(out / CARD, card(out.resolve().name, run, adapter=adapter, base_model=run["recipe"]["model"]))


def card(
    name: str, run: Mapping[str, Any], *, adapter: bool, base_model: str | None, evidence: Sequence[str] = ()
) -> str:
    """The model card: base, objective, data, metrics, evaluations, the code to load the model, and the recipe.

    `name` is the folder or repository to load; `evidence` are lines of Markdown about evaluations.
    """
    recipe, metrics = run["recipe"], run["metrics"]
    objective = recipe["objective"]
    names = [objective] if isinstance(objective, str) else list(objective)
    package, loader = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    head = {
        "library_name": package,
        **({"base_model": base_model} if base_model else {}),
        "pipeline_tag": "text-generation",
        "tags": ["apo", "preference-optimization", *names],
    }
    rows = [f"| {key} | {value:.4g} |" for key, value in metrics.items() if isinstance(value, int | float)]
    dropped = run["data"]["train"]["dropped"]
    left_out = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items()) or "none"
    text = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name.rpartition('/')[2]}\n",
        f"{recipe['model']} trained with {objective_title(objective)} (beta {recipe['beta']}) on "
        f"{describe_size(run['data']['train'])} for {run['steps']:,} steps. Left out: {left_out}.\n",
        f"![Chosen and rejected over training]({PICTURE})\n",
        f"At {describe_step(run)}:\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n",
        *(["## Evaluation\n", "\n".join(evidence) + "\n"] if evidence else []),
        f'```python\nfrom {package} import {loader}\nmodel = {loader}.from_pretrained("{name}")\n```\n',
        "## Recipe\n\n```yaml\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) + "```\n",
        "Versions, counts and all metrics: `run.json` and `metrics.jsonl`. Made with clair-apo and TRL.\n",
    ]
    return "\n".join(text)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or samples.jsonl, without a last line that a killed process left incomplete."""
    file = Path(path)
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
