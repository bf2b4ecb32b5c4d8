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
    FEW,
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
class ComparedRow:
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
            f"{_short(base_settings[name])} in the other{more}; evaluate both in the same way"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-19:]}"


def pair_rows(results: Sequence[Results]) -> list[ComparedRow]:
    """The rows that all results answered, in the order of the benchmark.

    Raises UserError where a row is missing in one of them, or asks another question.
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
        for key, items in tuned_rows.items():
            if items[0].question != first[key][0].question:
                raise UserError(f"{tuned.folder} and {base.folder}: {key[0]} {key[1]} asks different questions")
    strict = base.score.profile == "strict"
    return [_row(items[0], [tuned_rows[key] for tuned_rows in answered], strict) for key, items in first.items()]


def _row(first: Item, answers: Sequence[Sequence[Item]], strict: bool) -> ComparedRow:
    bounds = [[_bounds(item, strict) for item in items] for items in answers]
    return ComparedRow(
        first.split,
        first.benchmark,
        first.question,
        first.cluster,
        tuple(_mean([item.score for item in items]) for items in answers),
        tuple(_mean([low for low, _ in model_bounds]) for model_bounds in bounds),
        tuple(_mean([high for _, high in model_bounds]) for model_bounds in bounds),
        not any(item.unanswered for items in answers for item in items),
    )


def _bounds(item: Item, strict: bool) -> tuple[float, float]:
    """The item's score, or 0 and 1 where it is unresolved; under *strict* where its answer was cut off too."""
    settled = item.unresolved is None and not (item.truncated and strict)
    return (item.score, item.score) if settled else (0.0, 1.0)


def _by_row(results: Results) -> dict[Key, list[Item]]:
    rows: dict[Key, list[Item]] = {}
    for item in results.items:
        rows.setdefault((item.split, item.row), []).append(item)
    return rows


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def model_names(folders: Sequence[Path]) -> list[str]:
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
    all_rows = pair_rows(results)
    rows = [row for row in all_rows if row.answered]
    if not rows:
        raise UserError("no row was answered by all models; run the same `apo eval mixeval` again")
    names = model_names([tuned.folder for tuned in results])
    sections = [
        _section(level, split, benchmark, chosen) for level, split, benchmark, chosen in _rows_by_section(all_rows)
    ]
    _correct(sections)
    differences = [[row.scores[k] - row.scores[0] for row in rows] for k in range(1, len(results))]
    return {
        "format": FORMAT,
        "compared": results[0].score.comparable(),
        "base": _model(names[0], results[0]),
        "tuned": [
            {**_model(name, tuned), "same_answers": _same_answers(results[0], tuned)}
            for name, tuned in zip(names[1:], results[1:], strict=True)
        ],
        "rows": len(rows),
        "left_out": len(all_rows) - len(rows),
        "questions": len({row.question for row in rows}),
        "clusters": len({row.cluster for row in rows}),
        "parts": sections,
        "best": _best(differences, [row.cluster for row in rows], names[1:]),
        "power": [
            _power(results[0], tuned, section, rows, difference, others or {})
            for tuned, section in zip(results[1:], sections[0]["tuned"], strict=True)
        ],
        **provenance(),
    }


def _model(name: str, results: Results) -> dict[str, Any]:
    score = results.score
    scores = {key: getattr(score, key) for key in ("overall", "free_form", "multiple_choice", "samples", "seed")}
    counts = {key: getattr(score, key) for key in ("unresolved", "fallbacks", "truncated")}
    model = {"model": score.model.name, "identity": score.model.identity}
    return {"name": name, "folder": str(results.folder), **model, **scores, **counts}


def _same_answers(base: Results, tuned: Results) -> bool:
    """Every answer is word for word the base's."""
    texts = {item.key: item.response for item in base.items}
    return all(texts.get(item.key) == item.response for item in tuned.items)


def _rows_by_section(rows: Sequence[ComparedRow]) -> Iterator[tuple[str, str | None, str | None, list[ComparedRow]]]:
    """(level, split, benchmark, rows) of all rows, and of each split with the benchmarks in it behind it.

    A part without any row that all models answered is left out.
    """
    yield "overall", None, None, list(rows)
    for split in SPLITS:
        inside = [row for row in rows if row.split == split]
        benchmarks = {row.benchmark for row in inside if row.answered}
        if benchmarks:
            yield "split", split, None, inside
        for benchmark in sorted(benchmarks):
            yield "benchmark", split, benchmark, [row for row in inside if row.benchmark == benchmark]


def _section(level: str, split: str | None, benchmark: str | None, rows: Sequence[ComparedRow]) -> dict[str, Any]:
    answered = [row for row in rows if row.answered]
    clusters = [row.cluster for row in answered]
    columns = list(zip(*(row.scores for row in answered), strict=True))
    brackets = [
        (_mean(low), _mean(high)) for low, high in zip(_columns(rows, "lowest"), _columns(rows, "highest"), strict=True)
    ]
    return {
        "level": level,
        "split": split,
        "benchmark": benchmark,
        "rows": len(answered),
        "questions": len({row.question for row in answered}),
        "clusters": len(set(clusters)),
        "base": {**_score(columns[0], clusters), "bracket": list(brackets[0])},
        "tuned": [
            {
                **_score(column, clusters),
                "bracket": [low, high],
                **_delta(columns[0], column, clusters),
                "delta_bracket": [low - brackets[0][1], high - brackets[0][0]],
            }
            for column, (low, high) in zip(columns[1:], brackets[1:], strict=True)
        ],
    }


def _columns(rows: Sequence[ComparedRow], name: str) -> list[tuple[float, ...]]:
    """What rows hold under a name, by model."""
    return list(zip(*(getattr(row, name) for row in rows), strict=True))


def _score(scores: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    if len(set(clusters)) < 2:
        return {"score": _mean(scores), "se": None, "ci95": None}
    estimate = clustered_score(scores, clusters)
    return {"score": estimate.mean, "se": estimate.se, "ci95": [estimate.lo, estimate.hi]}


def _delta(base: Sequence[float], tuned: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """The difference with its interval; without one, and why, where no error can be estimated."""
    changed_answers = Counter((before >= RIGHT, after >= RIGHT) for before, after in zip(base, tuned, strict=True))
    counts = {
        "better": sum(after > before for before, after in zip(base, tuned, strict=True)),
        "worse": sum(after < before for before, after in zip(base, tuned, strict=True)),
        "wrong_to_right": changed_answers[False, True],
        "right_to_wrong": changed_answers[True, False],
    }
    numbers = {
        "delta": (math.fsum(tuned) - math.fsum(base)) / len(base),
        "delta_se": None,
        "delta_ci95": None,
        "p": None,
    }
    if len(set(clusters)) < 2:
        return {**numbers, **counts, "no_interval": "a single question"}
    test = paired_difference(base, tuned, clusters)
    if not test.differing:
        why = "no score differs" if counts["better"] == counts["worse"] == 0 else "no question differs"
        return {**numbers, **counts, "no_interval": why}
    few = test.differing < FEW
    numbers |= {"p": test.cautious_p, "p_sign": test.p_sign if few else None, "differing": test.differing}
    estimate = test.estimate
    if math.isnan(estimate.se):
        return {**numbers, **counts, "no_interval": "every question differs by the same amount"}
    numbers |= {"delta_se": estimate.se, "df": estimate.df}
    if test.interval is None:
        only = f"only {test.differing} questions differ" if test.differing > 1 else "only one question differs"
        return {**numbers, **counts, "no_interval": only}
    return {**numbers, **counts, "delta_ci95": list(test.interval)}


def _correct(sections: Sequence[dict[str, Any]]) -> None:
    """Put Holm's p-values beside the others: over all models, and on each level over all of its parts."""
    for level in ("overall", "split", "benchmark"):
        tests = [tuned for section in sections if section["level"] == level for tuned in section["tuned"]]
        corrected = holm([math.nan if test["p"] is None else test["p"] for test in tests])
        for test, p in zip(tests, corrected, strict=True):
            test["p_holm"] = None if math.isnan(p) else p


def _best(differences: Sequence[Sequence[float]], clusters: Sequence[str], names: Sequence[str]) -> Any:
    """The best of several tuned models, and what of its lead the choosing made; None where no score differs."""
    if len(differences) < 2 or len(set(clusters)) < 2 or not any(map(any, differences)):
        return None
    best = best_of(differences, clusters)
    lead = {"name": names[best.place], "of": len(names), "delta": best.seen, "selection_bias": best.bias}
    return {**lead, "corrected": best.corrected, "ci95": [max(-1.0, best.lo), min(1.0, best.hi)]}


# ---- power


def _power(
    base: Results,
    tuned: Results,
    section: Mapping[str, Any],
    rows: Sequence[ComparedRow],
    difference: float,
    others: Mapping[str, Sequence[int]],
) -> dict[str, Any] | None:
    """What this design could have seen, and which one would see `difference`; None where no error can be estimated."""
    if section["delta_se"] is None:
        return None
    samples, df = min(base.score.samples, tuned.score.samples), section["df"]
    common = _common(base, tuned)
    draws = [tuned_item.score - base_item.score for base_item, tuned_item in common]
    variances = components(draws, [item.question for item, _ in common])  # within a question: sampling and judging
    of_clusters = components(draws, [item.cluster for item, _ in common])
    noise = variances.within / len(rows)  # of the squared error with one answer to each row
    needed = difference / detectable(1.0, df)  # the standard error that sees it
    # What a design with other samples would have: the error that was found, its noise exchanged.
    floor = max(0.0, section["delta_se"] ** 2 - noise / samples)
    size = {"rows": len(rows), "questions": len({row.question for row in rows})}
    designs = [
        {"samples": count, **size, **_errors(floor + noise / count, df)} for count in sorted({*_SAMPLES, samples})
    ]
    if math.isnan(noise):
        designs = []
    within = None if math.isnan(variances.within) else variances.within
    return {
        "difference": difference,
        "power": power_of(difference, section["delta_se"], df),
        "detectable": detectable(section["delta_se"], df),
        "samples": samples,
        "variance_between": variances.between,
        "variance_within": within,
        "by_samples": designs,
        "samples_needed": _samples_needed(noise, floor, needed),
        "questions_needed": math.ceil((variances.between + (within or 0)) / needed**2),
        "splits": [
            {"name": name, "samples": 1, "rows": sum(sizes), "questions": len(sizes),
             **_errors(design_se(of_clusters, sizes) ** 2, satterthwaite(sizes))}
            for name, sizes in others.items()
        ],
    }  # fmt: skip


def _common(base: Results, tuned: Results) -> list[tuple[Item, Item]]:
    """Single answers of both, as many to each row as both have, without what a server refused."""
    tuned_items = {item.key: item for item in tuned.items if not item.unanswered}
    return [(item, tuned_items[item.key]) for item in base.items if item.key in tuned_items and not item.unanswered]


def _errors(variance: float, df: float) -> dict[str, float]:
    se = math.sqrt(variance)
    return {"se": se, "detectable": detectable(se, df)}


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
    splits = {}
    for version in VERSIONS:
        for split, folder in FOLDERS.items():
            if (Path(data) / version / folder).is_dir() and (version, split) != (
                compared["version"],
                compared["split"],
            ):
                rows = load(data, version, split).all_rows
                splits[f"{split} {version}"] = list(Counter(row.cluster for row in rows).values())
    if not splits:
        raise UserError(
            f"--data {data} holds no split of MixEval but the compared one; leave --data out, or fetch more"
        )
    return splits


# ---- what changed


def changed_answers(results: Sequence[Results]) -> list[tuple[int, Item, Item]]:
    """(which tuned model, the base's item, its item) of every answer whose score changed, the largest change first."""
    base_items = {item.key: item for item in results[0].items}
    changed = [
        (index, base_items[item.key], item)
        for index, tuned in enumerate(results[1:])
        for item in tuned.items
        if item.key in base_items and item.score != base_items[item.key].score
    ]
    order = {key: number for number, key in enumerate(base_items)}
    return sorted(
        changed, key=lambda change: (-abs(change[2].score - change[1].score), change[0], order[change[1].key])
    )


def change_kind(before: float, after: float) -> str:
    """What a change of score is called."""
    if (before >= RIGHT) != (after >= RIGHT):
        return "wrong to right" if after > before else "right to wrong"
    return "better" if after > before else "worse"
