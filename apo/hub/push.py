"""Collect the files of a run for the hub: the model, its card with the evidence, run.json and the metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo.hub.evidence import evidence_lines
from apo.models.load import ADAPTER_CONFIG
from apo.run_dir.checkpoints import checkpoint_step, checkpoints, find_damage
from apo.run_dir.files import CARD, METRICS, PICTURE, RUN, card, read_log, read_run
from apo.training.run_json import last_metrics
from clair.core.errors import UserError
from clair.core.files import read_json
from clair.core.urls import without_secrets
from clair.inference.model_folder import content_files, weights_identity

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_STATE = re.compile(r"(optimizer|scheduler|rng_state|trainer_state).*")


def files_to_push(
    run_folder: Path, name: str, *, checkpoint: int | None, base: str | None, evidence: Sequence[Path]
) -> dict[str, Path | bytes]:
    """Return the files for the repository `name`, by their path in it.

    They belong to the finished run, or to the checkpoint of a step. Optimizer states, ledgers and samples are left out.
    `base` is the hub name of the base model, if the run was trained on a folder. Raises UserError if the run is not
    finished, a checkpoint is damaged, an adapter names a folder as its base, or evidence is of another model.
    """
    run = read_run(run_folder)
    rows, folder = read_log(run_folder / METRICS), run_folder
    if checkpoint is None and not run.get("finished"):
        raise UserError(
            f"{run_folder} is not finished; finish it, or push one of its checkpoints with --checkpoint STEP"
        )
    if checkpoint is not None:
        folder = _checkpoint(run_folder, checkpoint)
        rows = [row for row in rows if row["step"] <= checkpoint]
        run |= {"steps": checkpoint, "metrics": last_metrics(rows), "best": None}
    base_model, replaced = _base_model(folder, str(run["recipe"]["model"]), base)
    recipe = without_secrets({**run["recipe"], "model": base_model or Path(run["recipe"]["model"]).name})
    run |= {"recipe": recipe}
    lines = evidence_lines(evidence, folder, weights_identity(folder)) if evidence else []
    text = card(name, run, adapter=(folder / ADAPTER_CONFIG).exists(), base_model=base_model, evidence=lines)
    log = "".join(json.dumps(row) + "\n" for row in rows)
    files: dict[str, Path | bytes] = {file.name: file for file in content_files(folder) if not _STATE.match(file.name)}
    written = {CARD: text.encode(), RUN: _json(run), METRICS: log.encode()}
    picture = {PICTURE: run_folder / PICTURE} if (run_folder / PICTURE).exists() else {}
    return {**files, **replaced, **written, **picture}


def _checkpoint(run_folder: Path, step: int) -> Path:
    folder = run_folder / f"checkpoint-{step}"
    if not folder.is_dir():
        steps = ", ".join(str(checkpoint_step(entry)) for entry in checkpoints(run_folder)) or "none"
        raise UserError(f"{run_folder} has no checkpoint of step {step}; it has: {steps}")
    if damage := find_damage(folder):
        raise UserError(f"{folder} is damaged: {damage}; push another checkpoint")
    return folder


def _base_model(folder: Path, model: str, base: str | None) -> tuple[str | None, dict[str, bytes]]:
    """Return the base model's hub name (None if unknown), and the adapter's config if it must name it."""
    config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).exists() else None
    named = str(config["base_model_name_or_path"]) if config else model
    on_hub = bool(_HUB_NAME.fullmatch(named)) and not Path(named).exists()
    if config is None:
        return base or (named if on_hub else None), {}
    if base is None and not on_hub:
        raise UserError(
            f"the base of the adapter in {folder} is a folder of this machine, {named}; give its name on the hub "
            "with --base ORG/NAME"
        )
    return base or named, {ADAPTER_CONFIG: _json({**config, "base_model_name_or_path": base or named})}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
