"""The content of compare.json: is the tuned model better than the base, and how certain is that?

Rows are paired, because all models answer the same questions. A cluster is a passage, or a question without a passage:
MixEval-Hard 2024-06-01 has 1,000 rows of 446 questions in 430 clusters. Each difference has an interval and a p-value,
over all rows, for each split, and for each underlying benchmark. P-values are corrected (Holm) for the number of tuned
models, and below the overall level also for the number of splits or benchmarks. If fewer than ten clusters differ, an
exact sign test has to confirm the difference. A bracket is the range of a score or a difference: from every unresolved
item counted as wrong to every one counted as right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from apo.evaluation.compare.changes import RIGHT
from apo.evaluation.compare.power import power_analysis
from apo.evaluation.compare.rows import ComparedRow, model_names, pair_rows
from apo.evaluation.intervals import mean_with_interval
from apo.evaluation.records.ifeval import MEASURES, IFEvalScore
from apo.evaluation.records.mixeval import SPLITS, MixEvalScore
from apo.evaluation.results import Results
from clair.core.errors import UserError
from clair.core.provenance import provenance
from clair.core.statistics import MIN_DIFFERING, best_of, clustered_score, holm, paired_difference

FORMAT = 1
Section = tuple[str, str | None, str | None, list[ComparedRow]]


def comparison(
    results: Sequence[Results], *, difference: float = 0.02, split_sizes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Return the content of compare.json (docs/evaluation.md) for the results of the base, then of the tuned models.

    `difference` is the true difference, a share, whose power is computed. `split_sizes` names other splits whose power
    is predicted, each with the numbers of rows of its clusters.
    """
    score, paired = results[0].score, pair_rows(results)
    selections = list(_ifeval_sections(paired, score.groups) if isinstance(score, IFEvalScore) else _sections(paired))
    all_rows = selections[0][-1]
    rows = [row for row in all_rows if row.answered]
    if not rows:
        raise UserError(f"no row was answered by all models; run the same `apo eval {score.benchmark.lower()}` again")
    names = model_names([result.folder for result in results])
    sections = [_section(*selection) for selection in selections]
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
            power_analysis(results[0], tuned, section, rows, difference, split_sizes or {})
            for tuned, section in zip(results[1:], sections[0]["tuned"], strict=True)
        ],
        **provenance(),
    }


def _model(name: str, results: Results) -> dict[str, Any]:
    score = results.score
    scores = {**score.reported, "samples": score.samples, "seed": score.seed}
    fallbacks = {"fallbacks": score.fallbacks} if isinstance(score, MixEvalScore) else {}
    counts = {"unresolved": score.unresolved, **fallbacks, "truncated": score.truncated}
    model = {"model": score.model.name, "identity": score.model.identity}
    return {"name": name, "folder": str(results.folder), **model, **scores, **counts}


def _same_answers(base: Results, tuned: Results) -> bool:
    """True if every answer equals the base's."""
    texts = {item.key: item.response for item in base.items}
    return all(texts.get(item.key) == item.response for item in tuned.items)


def _sections(rows: Sequence[ComparedRow]) -> Iterator[Section]:
    """Yield (level, split, benchmark, rows) of all rows, then of each split, followed by its benchmarks.

    Sections without a row that all models answered are left out.
    """
    yield "overall", None, None, list(rows)
    for split in SPLITS:
        split_rows = [row for row in rows if row.split == split]
        benchmarks = {row.benchmark for row in split_rows if row.answered}
        if benchmarks:
            yield "split", split, None, split_rows
        for benchmark in sorted(benchmarks):
            yield "benchmark", split, benchmark, [row for row in split_rows if row.benchmark == benchmark]


def _ifeval_sections(rows: Sequence[ComparedRow], groups: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    """Yield (level, measure, group or type, rows) of each measure, prompts first, then of each group and type.

    The overall score is the loose one of prompts. Groups and types have loose scores; groups are on the level of
    splits.
    """
    for measure in MEASURES:
        level = "overall" if measure == MEASURES[0] else "split"
        yield level, measure, None, [row for row in rows if row.split == measure]
    instructions = [row for row in rows if row.split == "instruction_loose"]
    types = sorted({row.benchmark for row in instructions if row.answered})
    sections = [("split", name, members) for name, members in groups.items()]
    sections += [("benchmark", name, [name]) for name in types]
    for level, name, members in sections:
        chosen = [row for row in instructions if row.benchmark in members]
        if any(row.answered for row in chosen):
            yield level, "instruction_loose", name, chosen


def _section(level: str, split: str | None, benchmark: str | None, rows: Sequence[ComparedRow]) -> dict[str, Any]:
    answered = [row for row in rows if row.answered]
    clusters = [row.cluster for row in answered]
    columns = list(zip(*(row.scores for row in answered), strict=True))
    brackets = [
        (fmean(low), fmean(high)) for low, high in zip(_columns(rows, "lowest"), _columns(rows, "highest"), strict=True)
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
    """Return an attribute of the rows as one tuple per model."""
    return list(zip(*(getattr(row, name) for row in rows), strict=True))


def _score(scores: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    numbers = mean_with_interval(scores, clusters, clustered_score)
    return {"score": numbers.pop("mean"), **numbers}


def _delta(base: Sequence[float], tuned: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """Return the difference with its interval, or in `no_interval` why no standard error can be estimated."""
    pairs = list(zip(base, tuned, strict=True))
    verdicts = Counter((base_score >= RIGHT, tuned_score >= RIGHT) for base_score, tuned_score in pairs)
    counts = {
        "better": sum(tuned_score > base_score for base_score, tuned_score in pairs),
        "worse": sum(tuned_score < base_score for base_score, tuned_score in pairs),
        "wrong_to_right": verdicts[False, True],
        "right_to_wrong": verdicts[True, False],
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
        reason = "no score differs" if counts["better"] == counts["worse"] == 0 else "no question differs"
        return {**numbers, **counts, "no_interval": reason}
    few = test.differing < MIN_DIFFERING
    numbers |= {"p": test.cautious_p, "p_sign": test.p_sign if few else None, "differing": test.differing}
    estimate = test.estimate
    if math.isnan(estimate.se):
        return {**numbers, **counts, "no_interval": "every question differs by the same amount"}
    numbers |= {"delta_se": estimate.se, "df": estimate.df}
    if test.interval is None:
        reason = f"only {test.differing} questions differ" if test.differing > 1 else "only one question differs"
        return {**numbers, **counts, "no_interval": reason}
    return {**numbers, **counts, "delta_ci95": list(test.interval)}


def _correct(sections: Sequence[dict[str, Any]]) -> None:
    """Add p-values corrected by Holm's method, on each level over all of its sections and models."""
    for level in ("overall", "split", "benchmark"):
        tests = [tuned for section in sections if section["level"] == level for tuned in section["tuned"]]
        corrected = holm([math.nan if test["p"] is None else test["p"] for test in tests])
        for test, p in zip(tests, corrected, strict=True):
            test["p_holm"] = None if math.isnan(p) else p


def _best(differences: Sequence[Sequence[float]], clusters: Sequence[str], names: Sequence[str]) -> Any:
    """Return the best of several tuned models, corrected for the bias of its selection; None if no score differs."""
    if len(differences) < 2 or len(set(clusters)) < 2 or not any(map(any, differences)):
        return None
    best = best_of(differences, clusters)
    lead = {"name": names[best.candidate], "of": len(names), "delta": best.observed, "selection_bias": best.bias}
    return {**lead, "corrected": best.corrected, "ci95": [max(-1.0, best.lo), min(1.0, best.hi)]}
