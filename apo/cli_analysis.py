"""The commands `apo distinguish`, `calibrate` and `certify`. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer

from apo.cli_recipe import Out, Overrides, RecipeFile, read_recipe
from clair.data.records import LABELS

if TYPE_CHECKING:
    from apo.analysis.distinguishability import Distinguishability
    from apo.guarantees.calibrate import Filter
    from apo.guarantees.config import GuaranteeConfig


def distinguish(context: typer.Context, recipe: RecipeFile = None, out: Out = None, set_: Overrides = None) -> None:
    """Predict, before training, which clusters of pairs it will learn first, neglect or harm."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from apo.analysis.config import DistinguishConfig

    config = read_recipe(context, DistinguishConfig, recipe, set_, out)
    from apo.losses.mixture import resolve_mixture

    resolve_mixture(config.objective)
    from apo.analysis.clusters import check_labels, indices_of_shared_prompts
    from apo.analysis.distinguishability import distinguish as measure
    from apo.analysis.feature_files import file_features
    from apo.analysis.features import encode_rows, read_rows
    from apo.console import print_line, quieten
    from clair.core.console import show as print_
    from clair.core.files import write_json

    quieten()
    rows = read_rows(config.dataset)
    check_labels(rows, config.by)
    features = file_features(config.features, rows, prompt=True) if config.features else None
    pairs = encode_rows(rows, config.model, print_line)
    if features:
        indices = {id(row): index for index, row in enumerate(rows)}
        pairs = replace(pairs, features=features.select([indices[id(row)] for row in pairs.rows]))
    if config.by == "source":
        indices, total = indices_of_shared_prompts(pairs.rows), len(pairs.rows)
        if indices:
            print_line(f"comparing sources on the {len(indices):,} of {total:,} pairs whose prompts are in all of them")
            pairs = pairs.select(indices)
        else:
            print_line("no prompt is in all sources, so differences may come from the prompts")
    report = measure(pairs, config.by, config.objective, config.beta, seed=config.seed)
    print_(_cluster_table(report))
    for warning in report.warnings:
        print_(f"! {warning}")
    for line in report.prediction():
        print_(line)
    if config.out:
        from apo.models.load import find_model, hash_model_files
        from apo.monitoring.result_plots import draw_clusters

        config.out.mkdir(parents=True, exist_ok=True)
        content = {**asdict(report), "model": config.model, "model_sha256": hash_model_files(find_model(config.model))}
        write_json(config.out / "distinguish.json", content)
        draw_clusters(content, config.out / "distinguish.png")
        print_line(f"wrote {config.out}/distinguish.json and distinguish.png")
        if config.by in LABELS:
            print_line(f"to have it checked: apo train ... --set prediction={config.out}, then apo diagnose")


def calibrate(context: typer.Context, recipe: RecipeFile = None, set_: Overrides = None) -> None:
    """Calibrate a filter on the score gap from audited pairs, with a guarantee."""
    from apo.data.pair_rows import read_pair_rows
    from apo.guarantees.calibrate import calibrate as find_threshold
    from apo.guarantees.calibrate import read_audit
    from apo.guarantees.config import CalibrateConfig

    config = read_recipe(context, CalibrateConfig, recipe, set_)
    manifest, trained_ids = _manifest(config), _trained_ids(config)
    rows, audit = read_pair_rows(config.dataset), read_audit(config.audit)
    filter_ = find_threshold(rows, audit, config.alpha, config.guarantee, delta=config.delta, trained_on=trained_ids)
    print(f"{filter_.promise}.")
    total = len(filter_.accepted) + len(filter_.dropped)
    print(f"It keeps {len(filter_.accepted):,} of {total:,} pairs of {config.dataset}.", end=" ")
    print("In a clair recipe whose rows have scores:\n")
    print(filter_.recipe() or "# no filter: every pair may be kept", end="")
    _write_decisions(filter_, config, manifest)


def certify(context: typer.Context, recipe: RecipeFile = None, set_: Overrides = None) -> None:
    """Certify how far a score is from a property, with a guarantee. Pairs that differ by less are undecided."""
    from apo.data.pair_rows import read_pair_rows
    from apo.guarantees.calibrate import certify as find_certificate
    from apo.guarantees.calibrate import undecided
    from apo.guarantees.config import CertifyConfig

    config = read_recipe(context, CertifyConfig, recipe, set_)
    manifest, trained_ids = _manifest(config), _trained_ids(config)
    rows = read_pair_rows(config.dataset)
    options = config.model_dump(include={"of", "than", "ladder", "bound"})
    certificate = find_certificate(
        rows, config.alpha, config.property, **options, distance=config.distance or "", trained_on=trained_ids
    )
    if config.property not in ("rises", "same"):
        print(f"{certificate.summary()}.")
        return
    decided, within, below = undecided(rows, certificate)
    print(f"{certificate.summary()}.")
    others = f", and {below:,} are decided for the rejected answer" if below else ""
    print(f"{within:,} of {len(rows):,} pairs are undecided{others}. To leave them out of a clair build:\n")
    print(decided.recipe(), end="")
    _write_decisions(decided, config, manifest)


def _cluster_table(report: Distinguishability) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    columns = ["pairs", "speed %", "95 %", "delta", "coherence", "overlap", "conflict"]
    literal = any(cluster.literal for cluster in report.clusters)
    table = Table("", *columns, *(["literal"] if literal else []), box=SIMPLE)
    table.title = f"{report.objective}, beta {report.beta:g}: speed in % of the fastest"
    fastest = max(abs(c.speed.value) for c in report.clusters)
    for c in report.clusters:
        speed, lo, hi = (100 * value / fastest for value in (c.speed.value, c.speed.lo, c.speed.hi))
        distances = f"{c.delta.value:.3g}", f"{c.coherence.value:.2f}", f"{c.overlap:.2f}"
        last = [f"{c.literal.delta:.3g}" if c.literal else ""] if literal else []
        conflict = f"{c.conflict:.2f}" if c.conflict_with else ""
        table.add_row(c.name, str(c.n), f"{speed:.0f}", f"{lo:.0f} to {hi:.0f}", *distances, conflict, *last)
    return table


def _manifest(config: GuaranteeConfig) -> dict[str, Any]:
    """The manifest that a decisions file refers to, read before any work; empty if none is to be written."""
    from clair.data.dataset import read_manifest

    return read_manifest(config.dataset) if config.decisions else {}


def _trained_ids(config: GuaranteeConfig) -> list[str]:
    from apo.guarantees.calibrate import read_ids

    return [id for path in config.trained_on for id in read_ids(path)]


def _write_decisions(filter_: Filter, config: GuaranteeConfig, manifest: dict[str, Any]) -> None:
    from clair.core.files import write_json

    if config.decisions:
        write_json(config.decisions, filter_.decisions(manifest))
        print(f"\nOr put into effect on this dataset with: clair keep {config.dataset} {config.decisions}")
