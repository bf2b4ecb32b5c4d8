"""Is the tuned model better than the base, and could we have seen it? Two result folders or more, row by row.

Rows are paired, questions are the clusters: MixEval-Hard asks 446 questions in 1,000 rows, and two models meet the same
questions. A difference is told with its interval and p-value, for all rows, each split and each underlying benchmark;
p-values are corrected (Holm) for the number of tuned models, and those of splits and benchmarks for their number too.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo.evaluate.mixeval import FOLDERS, VERSIONS, load
from apo.evaluate.results import SPLITS, Item, Results, read_results
from clair.recipe import UserError, provenance
from clair.statistics import (
    Components,
    best_of,
    clustered_score,
    components,
    design_se,
    detectable,
    holm,
    paired_difference,
    power_of,
    satterthwaite,
)

FORMAT = 1
_SAMPLES = (1, 2, 4, 8, 16)
RIGHT = 0.5
"""A score from here on counts as right where right and wrong are told apart: flips."""

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the benchmark as every model answered it: scores are means over samples, the base's first."""

    split: str
    benchmark: str
    question: str
    scores: tuple[float, ...]


def read_all(base: str | Path, tuned: Sequence[str | Path]) -> list[Results]:
    """The base's results and then the tuned models'. Raises UserError, before anything is computed, for a folder that
    is no finished result, is given twice, or was evaluated in another way than the base.
    """
    if not tuned:
        raise UserError("only one result folder; a comparison needs BASE and at least one TUNED")
    folders = [Path(folder) for folder in (base, *tuned)]
    for place, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise UserError(f"{folder} is given twice; compare different results")
    results = [read_results(folder) for folder in folders]
    for other in results[1:]:
        _check_comparable(results[0], other)
    for place, one in enumerate(results):
        for other in results[:place]:
            same_model = one.score.model.identity == other.score.model.identity
            if same_model and one.score.items_sha256 == other.score.items_sha256:
                raise UserError(f"{one.folder} is a copy of {other.folder}; compare different results")
    return results


def _check_comparable(base: Results, other: Results) -> None:
    ours, theirs = base.score.comparable(), other.score.comparable()
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        name = differing[0]
        more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        raise UserError(
            f"{other.folder} and {base.folder} cannot be compared: {name} is {_short(theirs[name])} in one and "
            f"{_short(ours[name])} in the other{more}; evaluate both in the same way"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-19:]}"


def rows_of(results: Sequence[Results]) -> list[Row]:
    """The rows that all results answered, in the order of the benchmark.

    Raises UserError where a row is missing in one of them, or asks another question.
    """
    answered = [_by_row(found) for found in results]
    first, base = answered[0], results[0]
    for found, own in zip(results[1:], answered[1:], strict=True):
        if missing := sorted(first.keys() ^ own.keys()):
            where = base.folder if missing[0] in first else found.folder
            raise UserError(
                f"{found.folder} and {base.folder} hold different rows: {len(missing)} only in one of them, first "
                f"{missing[0][0]} {missing[0][1]}, only in {where}; evaluate both on the same rows"
            )
        for key, items in own.items():
            if items[0].question != first[key][0].question:
                raise UserError(f"{found.folder} and {base.folder}: {key[0]} {key[1]} asks different questions")
    return [
        Row(key[0], items[0].benchmark, items[0].question, tuple(_mean(own[key]) for own in answered))
        for key, items in first.items()
    ]


def _by_row(results: Results) -> dict[Key, list[Item]]:
    found: dict[Key, list[Item]] = {}
    for item in results.items:
        found.setdefault((item.split, item.row), []).append(item)
    return found


def _mean(items: Sequence[Item]) -> float:
    return math.fsum(item.score for item in items) / len(items)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: their paths without what all have in common."""
    paths = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common)) for path in paths]


# ---- the comparison


def comparison(
    results: Sequence[Results], *, difference: float = 0.02, others: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """What compare.json holds (docs/evaluation.md) of the base's results and the tuned models' behind them.

    `difference` is the one that the power is told for, a share; `others` are other splits to foretell, by name, with
    the number of rows of each of their questions.
    """
    rows = rows_of(results)
    names = names_of([found.folder for found in results])
    parts = [_part(level, split, benchmark, chosen) for level, split, benchmark, chosen in _parts(rows)]
    _correct(parts)
    differences = [[row.scores[k] - row.scores[0] for row in rows] for k in range(1, len(results))]
    return {
        "format": FORMAT,
        "compared": results[0].score.comparable(),
        "base": _model(names[0], results[0]),
        "tuned": [_model(name, found) for name, found in zip(names[1:], results[1:], strict=True)],
        "rows": len(rows),
        "questions": len({row.question for row in rows}),
        "parts": parts,
        "best": _best(differences, [row.question for row in rows], names[1:]),
        "power": [
            _power(results[0], found, part, rows, difference, others or {})
            for found, part in zip(results[1:], parts[0]["tuned"], strict=True)
        ],
        **provenance(),
    }


def _model(name: str, results: Results) -> dict[str, Any]:
    score = results.score
    told = {key: getattr(score, key) for key in ("overall", "free_form", "multiple_choice", "samples", "seed")}
    counts = {key: getattr(score, key) for key in ("unresolved", "fallbacks", "truncated")}
    model = {"model": score.model.name, "identity": score.model.identity}
    return {"name": name, "folder": str(results.folder), **model, **told, **counts}


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, str | None, str | None, list[Row]]]:
    """(level, split, benchmark, rows) of all rows, and of each split with the benchmarks in it behind it."""
    yield "overall", None, None, list(rows)
    for split in SPLITS:
        inside = [row for row in rows if row.split == split]
        if inside:
            yield "split", split, None, inside
        for benchmark in sorted({row.benchmark for row in inside}):
            yield "benchmark", split, benchmark, [row for row in inside if row.benchmark == benchmark]


def _part(level: str, split: str | None, benchmark: str | None, rows: Sequence[Row]) -> dict[str, Any]:
    questions = [row.question for row in rows]
    columns = list(zip(*(row.scores for row in rows), strict=True))
    base = columns[0]
    return {
        "level": level,
        "split": split,
        "benchmark": benchmark,
        "rows": len(rows),
        "questions": len(set(questions)),
        "base": _score(base, questions),
        "tuned": [{**_score(column, questions), **_delta(base, column, questions)} for column in columns[1:]],
    }


def _score(scores: Sequence[float], questions: Sequence[str]) -> dict[str, Any]:
    if len(set(questions)) < 2:
        return {"score": math.fsum(scores) / len(scores), "se": None, "ci95": None}
    found = clustered_score(scores, questions)
    return {"score": found.mean, "se": found.se, "ci95": [found.lo, found.hi]}


def _delta(base: Sequence[float], tuned: Sequence[float], questions: Sequence[str]) -> dict[str, Any]:
    """The difference with its interval; without one, and why, where no error can be estimated."""
    flips = Counter((one >= RIGHT, other >= RIGHT) for one, other in zip(base, tuned, strict=True))
    counts = {
        "better": sum(other > one for one, other in zip(base, tuned, strict=True)),
        "worse": sum(other < one for one, other in zip(base, tuned, strict=True)),
        "wrong_to_right": flips[False, True],
        "right_to_wrong": flips[True, False],
    }
    told = {"delta": (math.fsum(tuned) - math.fsum(base)) / len(base), "delta_se": None, "delta_ci95": None, "p": None}
    if len(set(questions)) < 2:
        return {**told, **counts, "no_interval": "a single question"}
    found = paired_difference(base, tuned, questions)
    if found.estimate.se == 0:
        return {**told, **counts, "no_interval": "every question differs by the same amount"}
    told |= {"delta_se": found.estimate.se, "delta_ci95": [found.estimate.lo, found.estimate.hi], "p": found.p}
    return {**told, **counts, "df": found.estimate.df}


def _correct(parts: Sequence[dict[str, Any]]) -> None:
    """Put Holm's p-values beside the others: over all models, and on each level over all of its parts."""
    for level in ("overall", "split", "benchmark"):
        tests = [tuned for part in parts if part["level"] == level for tuned in part["tuned"]]
        corrected = holm([math.nan if test["p"] is None else test["p"] for test in tests])
        for test, p in zip(tests, corrected, strict=True):
            test["p_holm"] = None if math.isnan(p) else p


def _best(differences: Sequence[Sequence[float]], questions: Sequence[str], names: Sequence[str]) -> Any:
    """The best of several tuned models, and what of its lead the choosing made."""
    if len(differences) < 2 or len(set(questions)) < 2:
        return None
    found = best_of(differences, questions)
    told = {"name": names[found.place], "of": len(names), "delta": found.seen, "selection_bias": found.bias}
    return {**told, "corrected": found.corrected, "ci95": [found.lo, found.hi]}


# ---- power


def _power(
    base: Results,
    tuned: Results,
    part: Mapping[str, Any],
    rows: Sequence[Row],
    difference: float,
    others: Mapping[str, Sequence[int]],
) -> dict[str, Any] | None:
    """What this design could have seen, and which one would see `difference`; None where no error can be estimated."""
    if part["delta_se"] is None:
        return None
    sizes = list(Counter(row.question for row in rows).values())
    samples = min(base.score.samples, tuned.score.samples)
    draws, clusters = _draws(base, tuned)
    parts, df = components(draws, clusters), part["df"]
    needed = difference / detectable(1.0, df)  # the standard error that sees it
    designs = [_design(parts, sizes, count) for count in sorted({*_SAMPLES, samples})]
    if math.isnan(parts.within):
        designs = []
    return {
        "difference": difference,
        "power": power_of(difference, part["delta_se"], df),
        "detectable": detectable(part["delta_se"], df),
        "samples": samples,
        "variance_between": parts.between,
        "variance_within": None if math.isnan(parts.within) else parts.within,
        "by_samples": designs,
        "samples_needed": _samples_needed(parts, sizes, needed),
        "questions_needed": math.ceil((parts.between + (0 if math.isnan(parts.within) else parts.within)) / needed**2),
        "splits": [{"name": name, **_design(parts, counts, 1)} for name, counts in others.items()],
    }


def _draws(base: Results, tuned: Results) -> tuple[list[float], list[str]]:
    """Differences of single answers, as many to each row as both have, and their questions."""
    after = {item.key: item.score for item in tuned.items}
    common = [item for item in base.items if item.key in after]
    return [after[item.key] - item.score for item in common], [item.question for item in common]


def _design(parts: Components, sizes: Sequence[int], samples: int) -> dict[str, Any]:
    se = design_se(parts, sizes, samples)
    return {
        "samples": samples,
        "rows": sum(sizes),
        "questions": len(sizes),
        "se": se,
        "detectable": detectable(se, satterthwaite(sizes)),
    }


def _samples_needed(parts: Components, sizes: Sequence[int], se: float) -> int | None:
    """How many answers to each row bring the standard error to `se`; None where no number does or none is known."""
    if math.isnan(parts.within):
        return None
    n = sum(sizes)
    left = se**2 - sum(size**2 for size in sizes) * parts.between / n**2
    if left <= 0:
        return None
    return max(1, math.ceil(parts.within / n / left))


def other_splits(data: str | Path, compared: Mapping[str, Any]) -> dict[str, list[int]]:
    """How often each question is asked, by name of split, in every version of MixEval in a data folder but that one.

    Raises UserError where the folder holds none, or one that was altered.
    """
    found = {}
    for version in VERSIONS:
        for split, folder in FOLDERS.items():
            if (Path(data) / version / folder).is_dir() and (version, split) != (
                compared["version"],
                compared["split"],
            ):
                rows = load(data, version, split).all_rows
                found[f"{split} {version}"] = list(Counter(row.question for row in rows).values())
    if not found:
        raise UserError(
            f"--data {data} holds no split of MixEval but the compared one; leave --data out, or fetch more"
        )
    return found


# ---- what changed


def flips(results: Sequence[Results]) -> list[tuple[int, Item, Item]]:
    """(which tuned model, the base's item, its item) of every answer whose score changed, the largest change first."""
    before = {item.key: item for item in results[0].items}
    changed = [
        (place, before[item.key], item)
        for place, found in enumerate(results[1:])
        for item in found.items
        if item.key in before and item.score != before[item.key].score
    ]
    order = {key: number for number, key in enumerate(before)}
    return sorted(changed, key=lambda one: (-abs(one[2].score - one[1].score), one[0], order[one[1].key]))


def flip_kind(before: float, after: float) -> str:
    """What a change of score is called."""
    if (before >= RIGHT) != (after >= RIGHT):
        return "wrong to right" if after > before else "right to wrong"
    return "better" if after > before else "worse"
