"""Is the tuned model better than the base, and could we have seen it? Two result folders or more, row by row.

Rows are paired, since two models meet the same questions. Clusters are passages, and questions without one:
MixEval-Hard 2024-06-01 asks 446 questions about 430 of them in 1,000 rows. A difference is told with its interval and
p-value, for all rows, each split and each underlying benchmark; p-values are corrected (Holm) for the number of tuned
models, and those of splits and benchmarks for their number too. Where fewer than ten clusters differ, an exact sign
test has to find the difference as well. What is unresolved is bracketed: all of it wrong, all right.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo.evaluation.mixeval.benchmark import FOLDERS, VERSIONS, load
from apo.evaluation.results import SPLITS, Item, Results, read_results
from clair.core.errors import UserError
from clair.core.provenance import provenance
from clair.core.statistics import (
    MIN_DIFFERING,
    best_of,
    clustered_score,
    design_se,
    holm,
    paired_difference,
    satterthwaite,
    variance_components,
)
from clair.core.student_t import detectable_difference, t_test_power

FORMAT = 1
_SAMPLES = (1, 2, 4, 8, 16)
RIGHT = 0.5
"""A score from here on counts as right where right and wrong are told apart: flips."""

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the benchmark as every model answered it: scores are means over samples, the base's first.

    `lowest` and `highest` are the scores with everything unresolved wrong and right. A row that a server refused to one
    of the models is not `answered`: its scores are unknown.
    """

    split: str
    benchmark: str
    question: str
    cluster: str
    scores: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    answered: bool


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
    strict = base.score.profile == "strict"
    return [_row(items[0], [own[key] for own in answered], strict) for key, items in first.items()]


def _row(first: Item, answers: Sequence[Sequence[Item]], strict: bool) -> Row:
    bounds = [[_bounds(item, strict) for item in items] for items in answers]
    return Row(
        first.split,
        first.benchmark,
        first.question,
        first.cluster,
        tuple(_mean([item.score for item in items]) for items in answers),
        tuple(_mean([low for low, _ in own]) for own in bounds),
        tuple(_mean([high for _, high in own]) for own in bounds),
        not any(item.unanswered for items in answers for item in items),
    )


def _bounds(item: Item, strict: bool) -> tuple[float, float]:
    """The item's score, or 0 and 1 where it is unresolved; under *strict* where its answer was cut off too."""
    settled = item.unresolved is None and not (item.truncated and strict)
    return (item.score, item.score) if settled else (0.0, 1.0)


def _by_row(results: Results) -> dict[Key, list[Item]]:
    found: dict[Key, list[Item]] = {}
    for item in results.items:
        found.setdefault((item.split, item.row), []).append(item)
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


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
    the number of rows of each of their clusters.
    """
    every = rows_of(results)
    rows = [row for row in every if row.answered]
    if not rows:
        raise UserError("no row was answered by all models; run the same `apo eval mixeval` again")
    names = names_of([found.folder for found in results])
    parts = [_part(level, split, benchmark, chosen) for level, split, benchmark, chosen in _parts(every)]
    _correct(parts)
    differences = [[row.scores[k] - row.scores[0] for row in rows] for k in range(1, len(results))]
    return {
        "format": FORMAT,
        "compared": results[0].score.comparable(),
        "base": _model(names[0], results[0]),
        "tuned": [
            {**_model(name, found), "same_answers": _same_answers(results[0], found)}
            for name, found in zip(names[1:], results[1:], strict=True)
        ],
        "rows": len(rows),
        "left_out": len(every) - len(rows),
        "questions": len({row.question for row in rows}),
        "clusters": len({row.cluster for row in rows}),
        "parts": parts,
        "best": _best(differences, [row.cluster for row in rows], names[1:]),
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


def _same_answers(base: Results, tuned: Results) -> bool:
    """Every answer is word for word the base's."""
    texts = {item.key: item.response for item in base.items}
    return all(texts.get(item.key) == item.response for item in tuned.items)


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, str | None, str | None, list[Row]]]:
    """(level, split, benchmark, rows) of all rows, and of each split with the benchmarks in it behind it.

    A part without any row that all models answered is left out.
    """
    yield "overall", None, None, list(rows)
    for split in SPLITS:
        inside = [row for row in rows if row.split == split]
        known = {row.benchmark for row in inside if row.answered}
        if known:
            yield "split", split, None, inside
        for benchmark in sorted(known):
            yield "benchmark", split, benchmark, [row for row in inside if row.benchmark == benchmark]


def _part(level: str, split: str | None, benchmark: str | None, rows: Sequence[Row]) -> dict[str, Any]:
    known = [row for row in rows if row.answered]
    clusters = [row.cluster for row in known]
    columns = list(zip(*(row.scores for row in known), strict=True))
    ends = [
        (_mean(low), _mean(high)) for low, high in zip(_columns(rows, "lowest"), _columns(rows, "highest"), strict=True)
    ]
    return {
        "level": level,
        "split": split,
        "benchmark": benchmark,
        "rows": len(known),
        "questions": len({row.question for row in known}),
        "clusters": len(set(clusters)),
        "base": {**_score(columns[0], clusters), "bracket": list(ends[0])},
        "tuned": [
            {
                **_score(column, clusters),
                "bracket": [low, high],
                **_delta(columns[0], column, clusters),
                "delta_bracket": [low - ends[0][1], high - ends[0][0]],
            }
            for column, (low, high) in zip(columns[1:], ends[1:], strict=True)
        ],
    }


def _columns(rows: Sequence[Row], name: str) -> list[tuple[float, ...]]:
    """What rows hold under a name, by model."""
    return list(zip(*(getattr(row, name) for row in rows), strict=True))


def _score(scores: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    if len(set(clusters)) < 2:
        return {"score": _mean(scores), "se": None, "ci95": None}
    found = clustered_score(scores, clusters)
    return {"score": found.mean, "se": found.se, "ci95": [found.lo, found.hi]}


def _delta(base: Sequence[float], tuned: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """The difference with its interval; without one, and why, where no error can be estimated."""
    flips = Counter((one >= RIGHT, other >= RIGHT) for one, other in zip(base, tuned, strict=True))
    counts = {
        "better": sum(other > one for one, other in zip(base, tuned, strict=True)),
        "worse": sum(other < one for one, other in zip(base, tuned, strict=True)),
        "wrong_to_right": flips[False, True],
        "right_to_wrong": flips[True, False],
    }
    told = {"delta": (math.fsum(tuned) - math.fsum(base)) / len(base), "delta_se": None, "delta_ci95": None, "p": None}
    if len(set(clusters)) < 2:
        return {**told, **counts, "no_interval": "a single question"}
    found = paired_difference(base, tuned, clusters)
    if not found.differing:
        why = "no score differs" if counts["better"] == counts["worse"] == 0 else "no question differs"
        return {**told, **counts, "no_interval": why}
    few = found.differing < MIN_DIFFERING
    told |= {"p": found.cautious_p, "p_sign": found.p_sign if few else None, "differing": found.differing}
    estimate = found.estimate
    if math.isnan(estimate.se):
        return {**told, **counts, "no_interval": "every question differs by the same amount"}
    told |= {"delta_se": estimate.se, "df": estimate.df}
    if found.interval is None:
        only = f"only {found.differing} questions differ" if found.differing > 1 else "only one question differs"
        return {**told, **counts, "no_interval": only}
    return {**told, **counts, "delta_ci95": list(found.interval)}


def _correct(parts: Sequence[dict[str, Any]]) -> None:
    """Put Holm's p-values beside the others: over all models, and on each level over all of its parts."""
    for level in ("overall", "split", "benchmark"):
        tests = [tuned for part in parts if part["level"] == level for tuned in part["tuned"]]
        corrected = holm([math.nan if test["p"] is None else test["p"] for test in tests])
        for test, p in zip(tests, corrected, strict=True):
            test["p_holm"] = None if math.isnan(p) else p


def _best(differences: Sequence[Sequence[float]], clusters: Sequence[str], names: Sequence[str]) -> Any:
    """The best of several tuned models, and what of its lead the choosing made; None where no score differs."""
    if len(differences) < 2 or len(set(clusters)) < 2 or not any(map(any, differences)):
        return None
    found = best_of(differences, clusters)
    told = {"name": names[found.candidate], "of": len(names), "delta": found.observed, "selection_bias": found.bias}
    return {**told, "corrected": found.corrected, "ci95": [max(-1.0, found.lo), min(1.0, found.hi)]}


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
    samples, df = min(base.score.samples, tuned.score.samples), part["df"]
    common = _common(base, tuned)
    draws = [after.score - before.score for before, after in common]
    parts = variance_components(draws, [item.question for item, _ in common])  # within a question: sampling and judging
    of_clusters = variance_components(draws, [item.cluster for item, _ in common])
    noise = parts.within / len(rows)  # of the squared error with one answer to each row
    needed = difference / detectable_difference(1.0, df)  # the standard error that sees it
    # What a design with other samples would have: the error that was found, its noise exchanged.
    floor = max(0.0, part["delta_se"] ** 2 - noise / samples)
    size = {"rows": len(rows), "questions": len({row.question for row in rows})}
    designs = [
        {"samples": count, **size, **_errors(floor + noise / count, df)} for count in sorted({*_SAMPLES, samples})
    ]
    if math.isnan(noise):
        designs = []
    return {
        "difference": difference,
        "power": t_test_power(difference, part["delta_se"], df),
        "detectable": detectable_difference(part["delta_se"], df),
        "samples": samples,
        "variance_between": parts.between,
        "variance_within": None if math.isnan(parts.within) else parts.within,
        "by_samples": designs,
        "samples_needed": _samples_needed(noise, floor, needed),
        "questions_needed": math.ceil((parts.between + (0 if math.isnan(parts.within) else parts.within)) / needed**2),
        "splits": [
            {"name": name, "samples": 1, "rows": sum(sizes), "questions": len(sizes),
             **_errors(design_se(of_clusters, sizes) ** 2, satterthwaite(sizes))}
            for name, sizes in others.items()
        ],
    }  # fmt: skip


def _common(base: Results, tuned: Results) -> list[tuple[Item, Item]]:
    """Single answers of both, as many to each row as both have, without what a server refused."""
    after = {item.key: item for item in tuned.items if not item.unanswered}
    return [(item, after[item.key]) for item in base.items if item.key in after and not item.unanswered]


def _errors(variance: float, df: float) -> dict[str, float]:
    se = math.sqrt(variance)
    return {"se": se, "detectable": detectable_difference(se, df)}


def _samples_needed(noise: float, floor: float, se: float) -> int | None:
    """How many answers to each row bring the standard error to `se`; None where no number does or none is known."""
    left = se**2 - floor
    if math.isnan(noise) or left <= 0:
        return None
    return max(1, math.ceil(noise / left))


def other_splits(data: str | Path, compared: Mapping[str, Any]) -> dict[str, list[int]]:
    """How many rows each cluster has, by name of split, in every version of MixEval in a data folder but that one.

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
                found[f"{split} {version}"] = list(Counter(row.cluster for row in rows).values())
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
