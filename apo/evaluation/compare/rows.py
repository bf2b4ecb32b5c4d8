"""Read the result folders to compare, and pair their rows: all models answer the same questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from apo.evaluation.records.benchmark import Scored
from apo.evaluation.results import Results, read_results
from clair.core.errors import UserError

Key = tuple[str, int | tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One row of the benchmark with the score of every model, the base's first. A score is a mean over samples.

    IFEval has one row for each measure (`split`) of each prompt or instruction; `benchmark` is the instruction's type.
    `lowest` and `highest` are the scores with every unresolved item counted as wrong, and as right. If a server refused
    the row for one of the models, `answered` is False and the scores are unknown.
    """

    split: str
    benchmark: str
    question: str
    cluster: str
    scores: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    answered: bool


def read_comparable(base: str | Path, tuned: Sequence[str | Path]) -> list[Results]:
    """Read the results of the base, then those of the tuned models.

    Raises UserError, before anything is computed, for a folder that holds no finished result, that is named twice, or
    whose settings differ from the base's.
    """
    if not tuned:
        raise UserError("only one result folder; give BASE and at least one TUNED")
    folders = [Path(folder) for folder in (base, *tuned)]
    for index, folder in enumerate(folders):
        if folder.resolve() in [earlier.resolve() for earlier in folders[:index]]:
            raise UserError(f"{folder} is given twice; compare different results")
    results = [read_results(folder) for folder in folders]
    for earlier in results[1:]:
        _check_comparable(results[0], earlier)
    for index, result in enumerate(results):
        for earlier in results[:index]:
            same_model = result.score.model.identity == earlier.score.model.identity
            if same_model and result.score.items_sha256 == earlier.score.items_sha256:
                raise UserError(f"{result.folder} is a copy of {earlier.folder}; compare different results")
    return results


def _check_comparable(base: Results, tuned: Results) -> None:
    base_settings, tuned_settings = base.score.comparable(), tuned.score.comparable()
    differing = [name for name in base_settings if base_settings[name] != tuned_settings[name]]
    if differing:
        name = differing[0]
        more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        raise UserError(
            f"{tuned.folder} and {base.folder} cannot be compared: {name} is {_short(tuned_settings[name])} in one and "
            f"{_short(base_settings[name])} in the other{more}; evaluate both with the same settings"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-19:]}"


def pair_rows(results: Sequence[Results]) -> list[ComparedRow]:
    """Pair the rows of all results, in the order of the benchmark.

    Raises UserError if a row is missing in one of the results or asks another question there.
    """
    answered = [_by_row(tuned) for tuned in results]
    first, base = answered[0], results[0]
    for tuned, tuned_rows in zip(results[1:], answered[1:], strict=True):
        if missing := sorted(first.keys() ^ tuned_rows.keys()):
            folder = base.folder if missing[0] in first else tuned.folder
            raise UserError(
                f"{tuned.folder} and {base.folder} hold different rows: {len(missing)} only in one of them, first "
                f"{missing[0][0]} {missing[0][1]}, only in {folder}; evaluate both on the same rows"
            )
        for key, scored in tuned_rows.items():
            if scored[0].question != first[key][0].question:
                raise UserError(f"{tuned.folder} and {base.folder}: {key[0]} {key[1]} asks different questions")
    return [_row(scored[0], [tuned_rows[key] for tuned_rows in answered]) for key, scored in first.items()]


def _row(first: Scored, answers: Sequence[Sequence[Scored]]) -> ComparedRow:
    return ComparedRow(
        first.section,
        first.kind,
        first.question,
        first.cluster,
        tuple(fmean([entry.score for entry in scored]) for scored in answers),
        tuple(fmean([entry.score if entry.resolved else 0.0 for entry in scored]) for scored in answers),
        tuple(fmean([entry.score if entry.resolved else 1.0 for entry in scored]) for scored in answers),
        not any(entry.unanswered for scored in answers for entry in scored),
    )


def _by_row(results: Results) -> dict[Key, list[Scored]]:
    rows: dict[Key, list[Scored]] = {}
    for scored in results.scored():
        rows.setdefault((scored.section, scored.row), []).append(scored)
    return rows


def model_names(folders: Sequence[Path]) -> list[str]:
    """Return short distinct names of the folders: their paths below the common folder."""
    paths = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common)) for path in paths]
