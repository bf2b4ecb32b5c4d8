"""Statistical power of a comparison: the difference that it detects, and the designs that detect a smaller one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo.evaluation.compare.rows import ComparedRow
from apo.evaluation.mixeval.benchmark import FOLDERS, VERSIONS, load
from apo.evaluation.results import AnyItem, Results
from clair.core.errors import UserError
from clair.core.statistics import design_se, satterthwaite, variance_components
from clair.core.student_t import detectable_difference, t_test_power

_SAMPLES = (1, 2, 4, 8, 16)


def power_analysis(
    base: Results,
    tuned: Results,
    section: Mapping[str, Any],
    rows: Sequence[ComparedRow],
    difference: float,
    split_sizes: Mapping[str, Sequence[int]],
) -> dict[str, Any] | None:
    """Return the difference that this design detects, and the designs that would detect `difference`, a share.

    `section` holds the tuned model's numbers over all rows. `split_sizes` names other splits, each with the numbers of
    rows of its clusters. None if no standard error can be estimated.
    """
    if section["delta_se"] is None:
        return None
    samples, df = min(base.score.samples, tuned.score.samples), section["df"]
    common = _common_answers(base, tuned)
    draws = [tuned_item.score - base_item.score for base_item, tuned_item in common]
    # The variance within a question comes from sampling and judging.
    variances = variance_components(draws, [item.question for item, _ in common])
    cluster_variances = variance_components(draws, [item.cluster for item, _ in common])
    noise = variances.within / len(rows)  # its share in the squared standard error with one answer to each row
    needed = difference / detectable_difference(1.0, df)  # the standard error that detects `difference`
    # More samples reduce only the noise of sampling and judging. The remaining squared error stays.
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
        "power": t_test_power(difference, section["delta_se"], df),
        "detectable": detectable_difference(section["delta_se"], df),
        "samples": samples,
        "variance_between": variances.between,
        "variance_within": within,
        "by_samples": designs,
        "samples_needed": _samples_needed(noise, floor, needed),
        "questions_needed": math.ceil((variances.between + (within or 0)) / needed**2),
        "splits": [
            {
                "name": name,
                "samples": 1,
                "rows": sum(sizes),
                "questions": len(sizes),
                **_errors(design_se(cluster_variances, sizes) ** 2, satterthwaite(sizes)),
            }
            for name, sizes in split_sizes.items()
        ],
    }


def _common_answers(base: Results, tuned: Results) -> list[tuple[AnyItem, AnyItem]]:
    """Return pairs of answers to the same row and sample, without those that a server refused."""
    tuned_items = {item.key: item for item in tuned.items if not item.unanswered}
    return [(item, tuned_items[item.key]) for item in base.items if item.key in tuned_items and not item.unanswered]


def _errors(variance: float, df: float) -> dict[str, float]:
    se = math.sqrt(variance)
    return {"se": se, "detectable": detectable_difference(se, df)}


def _samples_needed(noise: float, floor: float, se: float) -> int | None:
    """Return how many answers to each row lower the standard error to `se`; None if no number does."""
    allowed_noise = se**2 - floor
    if math.isnan(noise) or allowed_noise <= 0:
        return None
    return max(1, math.ceil(noise / allowed_noise))


def other_splits(data: str | Path, compared: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the numbers of rows of the clusters of every split in a data folder except the `compared` one, by name.

    Raises UserError if the folder holds no other split, or an altered file.
    """
    if "version" not in compared:
        raise UserError(f"--data is for results of MixEval, and these are of {compared['benchmark']}; leave it out")
    splits = {}
    for version in VERSIONS:
        for split, folder in FOLDERS.items():
            is_compared = (version, split) == (compared["version"], compared["split"])
            if (Path(data) / version / folder).is_dir() and not is_compared:
                rows = load(data, version, split).all_rows
                splits[f"{split} {version}"] = list(Counter(row.cluster for row in rows).values())
    if not splits:
        raise UserError(
            f"--data {data} holds no split of MixEval except the compared one; leave --data out, or fetch another split"
        )
    return splits
