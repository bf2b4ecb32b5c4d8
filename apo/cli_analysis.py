"""The commands `apo distinguish`, `calibrate` and `certify`. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from clair.core.errors import UserError, near_miss
from clair.storage.object_store import local

if TYPE_CHECKING:
    from apo.analysis.distinguishability import Report
    from apo.guarantees.calibrate import Filter, Guarantee, Kind

Choice = TypeVar("Choice", bound=str)
Trained = Annotated[
    list[str] | None,
    typer.Option("--trained-on", help="The scorer's training data: a reward, a dataset or JSONL ids; repeatable."),
]
Decisions = Annotated[Path | None, typer.Option(help="A decisions file to write, for `clair keep`.")]


def distinguish(
    datasets: Annotated[list[str], typer.Argument(help="Pairs: a dataset folder, a file or a hub name; repeatable.")],
    model: Annotated[str, typer.Option(help="The model that will be trained.")],
    by: Annotated[str, typer.Option(help="user, group, behaviour, source or kmeans:K.")] = "kmeans:8",
    objective: Annotated[str, typer.Option(help="The objective that will be trained.")] = "apo_zero",
    beta: Annotated[float, typer.Option(help="Its beta.")] = 0.1,
    out: Annotated[
        Path | None, typer.Option(callback=local, help="A folder for distinguish.json and distinguish.png.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of random draws.")] = 0,
) -> None:
    """Predict from the pairs which groups training will learn first, neglect or hurt, before the first step."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from apo.losses.mixture import resolve_mixture

    resolve_mixture(objective)
    if beta <= 0:
        raise UserError(f"beta is {beta:g}; it must be above 0")
    from apo.analysis.distinguishability import distinguish as measure
    from apo.analysis.distinguishability import of_the_same_prompts
    from apo.analysis.features import labelled
    from apo.console import print_line, quieten
    from clair.core.console import show as print_
    from clair.core.files import write_json

    quieten()
    features = labelled(datasets, model, print_line)
    if by == "source":
        same = of_the_same_prompts(features.rows)
        if same:
            print_line(
                f"comparing sources on {len(same):,} of {len(features.rows):,} pairs, whose prompts all of them have"
            )
            features = features.select(same)
        else:
            print_line("no prompt is in all sources: what differs may be the prompts")
    report = measure(features, by, objective, beta, seed=seed)
    print_(_cluster_table(report))
    for warning in report.warnings:
        print_(f"! {warning}")
    if out:
        from apo.monitoring.plots import draw_clusters

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "distinguish.json", report.plain())
        draw_clusters(report.plain(), out / "distinguish.png")
        print_line(f"wrote {out}/distinguish.json and distinguish.png")


def calibrate(
    dataset: Annotated[str, typer.Argument(help="A dataset with score_chosen and score_rejected.")],
    audit: Annotated[Path, typer.Option(help="JSONL rows with id and bad (true or false).")],
    alpha: Annotated[float, typer.Option(help="The risk to guarantee.")] = 0.1,
    guarantee: Annotated[str, typer.Option(help="joint: P(kept and bad); precision: P(bad given kept).")] = "joint",
    delta: Annotated[float, typer.Option(help="precision: the probability that the guarantee fails.")] = 0.1,
    trained_on: Trained = None,
    decisions: Decisions = None,
) -> None:
    """Find a filter threshold on the score gap with a guarantee, from audited pairs."""
    from apo.guarantees.calibrate import calibrate as find_threshold
    from apo.guarantees.calibrate import read_audit, read_ids, read_scored

    choices: tuple[Guarantee, ...] = ("joint", "precision")
    checked_guarantee: Guarantee = _check_choice("guarantee", guarantee, choices)
    manifest = _manifest(dataset, decisions)
    trained_ids = [id for path in trained_on or [] for id in read_ids(path)]
    filter_ = find_threshold(
        read_scored(dataset), read_audit(audit), alpha, checked_guarantee, delta=delta, trained_on=trained_ids
    )
    print(f"{filter_.words}.")
    total = len(filter_.kept) + len(filter_.dropped)
    print(
        f"It keeps {len(filter_.kept):,} of {total:,} pairs of {dataset}. In a clair recipe whose rows have scores:\n"
    )
    print(filter_.recipe() or "# no filter: every pair may be kept", end="")
    _decide(filter_, dataset, manifest, decisions)


def certify(
    dataset: Annotated[str, typer.Argument(help="A dataset or JSONL file with columns of scores.")],
    kind: Annotated[str, typer.Option("--property", help="rises, same, floor or ceiling.")] = "rises",
    alpha: Annotated[float, typer.Option(help="The risk to guarantee.")] = 0.1,
    of: Annotated[str, typer.Option(help="The column that should rise, stay the same or respect the bound.")] = (
        "score_chosen"
    ),
    than: Annotated[str, typer.Option(help="rises, same: the column to compare it with.")] = "score_rejected",
    bound: Annotated[float, typer.Option(help="floor, ceiling: the bound.")] = 0.0,
    trained_on: Trained = None,
    decisions: Decisions = None,
) -> None:
    """Certify how far a score is from a property, with a guarantee; differences inside the band decide nothing."""
    from apo.guarantees.calibrate import KINDS, filter_above, read_ids, read_scored
    from apo.guarantees.calibrate import certify as find_certificate

    checked_kind: Kind = _check_choice("property", kind, KINDS)
    manifest = _manifest(dataset, decisions)
    trained_ids = [id for path in trained_on or [] for id in read_ids(path)]
    rows = read_scored(dataset)
    certificate = find_certificate(rows, alpha, checked_kind, of=of, than=than, bound=bound, trained_on=trained_ids)
    print(f"{certificate.summary()}.")
    if certificate.band.width == float("inf"):
        raise UserError(
            f"no finite band: alpha {alpha:g} needs more prompts than {certificate.n}; give more, or raise alpha"
        )
    if kind in ("floor", "ceiling"):
        if decisions:
            raise UserError(f"--decisions goes with rises and same: {kind} compares no two answers, so no gap decides")
        return
    undecided = filter_above(rows, certificate.band.width, certificate.words)
    print(f"{len(undecided.dropped):,} of {len(rows):,} pairs are undecided. To leave them out of a clair build:\n")
    print(undecided.recipe(), end="")
    _decide(undecided, dataset, manifest, decisions)


def _cluster_table(report: Report) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    columns = ["pairs", "speed %", "95 %", "delta", "coherence", "overlap", "conflict"]
    literal = any(cluster.literal for cluster in report.clusters)
    table = Table("", *columns, *(["literal"] if literal else []), box=SIMPLE)
    table.title = f"{report.objective}, beta {report.beta:g}: speed in % of the fastest"
    fastest = max(abs(c.speed.value) for c in report.clusters)
    for c in report.clusters:
        speed, lo, hi = (100 * value / fastest for value in (c.speed.value, c.speed.lo, c.speed.hi))
        table.add_row(
            c.name, str(c.n), f"{speed:.0f}", f"{lo:.0f} to {hi:.0f}", f"{c.delta.value:.3g}",
            f"{c.coherence.value:.2f}", f"{c.overlap:.2f}", f"{c.conflict:.2f}" if c.conflict_with else "",
            *([f"{c.literal.delta:.3g}" if c.literal else ""] if literal else []),
        )  # fmt: skip
    return table


def _check_choice(name: str, value: str, allowed: tuple[Choice, ...]) -> Choice:
    """The choice that equals `value`. Raises UserError if there is none."""
    for choice in allowed:
        if choice == value:
            return choice
    raise UserError(f"unknown {name} {value!r}{near_miss(value, allowed)}; allowed: {', '.join(allowed)}")


def _manifest(dataset: str, decisions: Path | None) -> dict[str, Any] | None:
    """The manifest that a decisions file refers to, read before any work."""
    from clair.data.dataset import read_manifest

    return read_manifest(dataset) if decisions else None


def _decide(filter_: Filter, dataset: str, manifest: dict[str, Any] | None, decisions: Path | None) -> None:
    from clair.core.files import write_json

    if decisions and manifest is not None:
        write_json(decisions, filter_.decisions(manifest))
        print(f"\nOr put into effect on this dataset with: clair keep {dataset} {decisions}")
