"""What the designs say: the nine claims as contrasts by world, their verdicts, and the tolerance of the objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clair.core.statistics import (
    Estimate,
    clustered_mean,
    equivalence_margin,
    equivalence_p,
    holm,
    paired_difference,
)
from recipes.experiments.paper_mini.design import (
    OBJECTIVES,
    Design,
    Name,
    Rows,
    Run,
    at_epoch,
    gain,
    is_regime,
    select,
)
from recipes.experiments.paper_mini.worlds import DOSES, TEMPLATES, stratum

ClaimVerdict = Literal["reproduced", "not reproduced", "equal", "not tested"]
SHARE_OF_BEST, SMALLEST_MARGIN, WORLDS_OF_MARGIN = 0.8, 2, 10


@dataclass(frozen=True)
class PaperClaim:
    """A claim of the paper with its source, and the expected sign of its contrast."""

    text: str
    source: str
    design: Name
    contrast: str
    above: bool = True
    nats: bool = False


CLAIMS = (
    PaperClaim("CLAIR with APO-zero makes the model better", "abstract", "D1", "APO-zero, gain"),
    PaperClaim("APO-zero beats SFT on the winners", "abstract", "D1", "APO-zero − SFT"),
    PaperClaim("APO-zero beats DPO where winners are better than the model", "from memory", "D1", "APO-zero − DPO"),
    PaperClaim("APO-down harms on CLAIR", "secondary source", "D1", "APO-down, gain at the shared rate", above=False),
    PaperClaim("Under DPO winners become less likely", "from memory", "D1", "DPO, held-out winners", False, nats=True),
    PaperClaim(
        "Under APO-zero winners become more likely", "equation 7", "D1", "APO-zero, held-out winners", nats=True
    ),
    PaperClaim(
        "APO-down beats APO-zero where winners are worse than the model", "equation 8", "D2", "APO-down − APO-zero"
    ),
    PaperClaim("The objective must fit the regime", "title and abstract", "D2", "(APO-zero − APO-down), strong − weak"),
    PaperClaim(
        "The more irrelevant change, the less is gained", "abstract", "D3", "APO-zero's gain, a dose", above=False
    ),
)


@dataclass(frozen=True)
class DesignResults:
    """The results of all designs of one size: worlds by name, runs by key."""

    design: Design
    worlds: Mapping[str, Mapping[str, Any]]
    rows: Rows

    @property
    def passed(self) -> dict[str, bool]:
        """True for each existing world if all its gates are met."""
        return {name: all(world["gates"].values()) for name, world in self.worlds.items()}

    @property
    def tuning(self) -> list[str]:
        """The tuning worlds whose gates are met."""
        return [world for world in self.design.tuning if self.passed.get(world)]

    def tested(self, name: Name) -> list[str]:
        """The worlds of a design whose gates are met."""
        return [world for world in self.design.worlds_of(name) if self.passed.get(world)]

    def gains(self, name: Name, pairs: str, objective: str, selected_on: str | None = None) -> list[float] | None:
        """Return the gain by world at the setting selected on the pairs `selected_on`; None if a run is missing."""
        setting = select(self.design, selected_on or pairs, objective, self.tuning, self.rows)
        if setting is None:
            return None
        return self._by_world(name, pairs, objective, setting.learning_rate, lambda row: gain(row, setting.epoch))

    def at_shared_rate(self, objective: str, value: Any) -> list[float] | None:
        """Return a value of D1's runs by world, at the rate that is selected for APO-zero."""
        setting = select(self.design, "clair", "apo_zero", self.tuning, self.rows)
        return setting and self._by_world("D1", "clair", objective, setting.learning_rate, value)

    def at_rate(self, objective: str, rate: float) -> list[float] | None:
        """Return the gain by world after the last epoch of D1's runs at this rate; None if a run is missing."""
        return self._by_world("D1", "clair", objective, rate, lambda row: gain(row, self.design.epochs))

    def _by_world(self, name: Name, pairs: str, objective: str, rate: float, value: Any) -> list[float] | None:
        rows = [self.rows.get(self.design.run(w, pairs, objective, rate).key) for w in self.tested(name)]
        return None if len(rows) < 2 or None in rows else [value(row) for row in rows if row is not None]


# ---- contrasts by world


def minus(left: Sequence[float] | None, right: Sequence[float] | None) -> list[float] | None:
    """Return the paired differences; None if a side is missing."""
    return None if left is None or right is None else [a - b for a, b in zip(left, right, strict=True)]


def slopes(by_dose: Sequence[Sequence[float]]) -> list[float]:
    """Return each world's least-squares slope over the doses 0, 1, ...; `by_dose` has one list of worlds per dose."""
    middle = (len(by_dose) - 1) / 2
    scale = math.fsum((dose - middle) ** 2 for dose in range(len(by_dose)))
    return [
        math.fsum((dose - middle) * value for dose, value in enumerate(values)) / scale
        for values in zip(*by_dose, strict=True)
    ]


def dose_gains(results: DesignResults, objective: str) -> list[list[float]] | None:
    """Return the gains by dose and world, at the setting selected for the correction alone; None if not run."""
    gains = [results.gains("D3", pairs, objective, selected_on="clair") for pairs in DOSES]
    return None if None in gains else [values for values in gains if values is not None]


def winners_change(row: Mapping[str, Any]) -> float:
    """Return how much a run has changed the log-likelihood of held-out winners, in nats per answer."""
    return row["checkpoints"][-1]["pairs"]["logps/chosen"] - row["checkpoints"][0]["pairs"]["logps/chosen"]


def contrasts(results: DesignResults) -> list[list[float] | None]:
    """Return the contrast of each claim in `CLAIMS` by world; None if it was not tested."""
    clair = {objective: results.gains("D1", "clair", objective) for objective in OBJECTIVES}
    last = results.design.epochs
    by_regime = {
        regime: {o: results.gains("D2", regime, o) for o in OBJECTIVES}
        if is_regime(results.design, regime, results.tuning, results.rows)
        else dict.fromkeys(OBJECTIVES)
        for regime in ("weak", "strong")
    }
    weak, strong = (minus(by_regime[r]["apo_zero"], by_regime[r]["apo_down"]) for r in ("weak", "strong"))
    doses = dose_gains(results, "apo_zero")
    return [
        clair["apo_zero"],
        minus(clair["apo_zero"], clair["sft"]),
        minus(clair["apo_zero"], clair["dpo"]),
        results.at_shared_rate("apo_down", lambda row: gain(row, last)),
        results.at_shared_rate("dpo", winners_change),
        results.at_shared_rate("apo_zero", winners_change),
        weak and [-value for value in weak],
        minus(strong, weak),
        slopes(doses) if doses else None,
    ]


# ---- verdicts


@dataclass(frozen=True)
class Judged:
    """A claim with its estimate over worlds, corrected p-value, verdict, and a remark."""

    claim: PaperClaim
    estimate: Estimate | None
    p: float
    verdict: ClaimVerdict
    remark: str = ""


def judge_claims(values: Sequence[Sequence[float] | None], margin: int | None) -> list[Judged]:
    """Judge the nine claims by their contrasts, with an equivalence margin in points.

    reproduced       Holm's p is below 0.05 over all claims, and the sign is the expected one
    equal            otherwise, if TOST at 5 % rejects a difference of the margin either way
    not reproduced   anything else that was tested; the remark says if the opposite was shown
    """
    tests = [paired_difference([0.0] * len(v), v, range(len(v))) if v else None for v in values]
    adjusted = holm([math.nan if test is None else test.p for test in tests])
    result = []
    for claim, test, p in zip(CLAIMS, tests, adjusted, strict=True):
        if test is None:
            result.append(Judged(claim, None, math.nan, "not tested"))
            continue
        estimate, clear = test.estimate, p < 0.05
        expected = (estimate.mean > 0) == claim.above
        if clear and expected:
            result.append(Judged(claim, estimate, p, "reproduced"))
        elif margin and not claim.nats and equivalence_p(estimate, margin / 100) < 0.05:
            result.append(Judged(claim, estimate, p, "equal", "the opposite sign, within the margin" if clear else ""))
        else:
            result.append(Judged(claim, estimate, p, "not reproduced", "the opposite" if clear else "undecided"))
    return result


def delta_verdict(difference: Sequence[float], margin: int | None) -> str:
    """The verdict of D4's one test on the differences by world, CLAIR's gain minus that of delta pairs."""
    test = paired_difference([0.0] * len(difference), difference, range(len(difference)))
    if test.p < 0.05:
        return f"{'CLAIR' if test.estimate.mean > 0 else 'delta'} pairs gain more"
    if margin and equivalence_p(test.estimate, margin / 100) < 0.05:
        return f"equal within {margin} points"
    return "undecided"


# ---- D0: tolerance, and the margin


RateAndEpoch = tuple[float, int]


def d0_gains(results: DesignResults, objective: str, beta: float) -> dict[RateAndEpoch, list[float]] | None:
    """Return D0's gains by rate and epoch, one per draw; None if a run is missing."""
    design, gains = results.design, {}
    for rate in design.rates:
        for world in results.tested("D0"):
            row = results.rows.get(Run(world, "clair", objective, rate, beta, design.short, 1).key)
            if row is None:
                return None
            for epoch in range(1, design.short + 1):
                gains.setdefault((rate, epoch), []).append(gain(row, epoch))
    return gains or None


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def tolerance(gains: Mapping[RateAndEpoch, Sequence[float]]) -> int:
    """Count the settings whose mean gain is at least `SHARE_OF_BEST` of the best one; 0 if no gain is above 0."""
    means = [mean(values) for values in gains.values()]
    return sum(value >= SHARE_OF_BEST * max(means) - 1e-9 for value in means) if max(means) > 0 else 0


def margin(results: DesignResults) -> int | None:
    """Return the equivalence margin in points, by the spread between D0's draws; None until D0 is complete.

    The spread is pooled over the cells of the last epoch in which both DPO and APO-zero keep half of their best gain.
    """
    design, variances = results.design, []
    for beta in design.betas:
        sides = [d0_gains(results, objective, beta) for objective in ("apo_zero", "dpo")]
        zero, dpo = sides
        if zero is None or dpo is None or len(results.tested("D0")) < 2:
            return None
        best = [max(mean(values) for values in side.values()) for side in (zero, dpo)]
        for rate in design.rates:
            cell = (rate, design.short)
            if all(mean(side[cell]) >= top / 2 > 0 for side, top in zip((zero, dpo), best, strict=True)):
                differences = [a - b for a, b in zip(zero[cell], dpo[cell], strict=True)]
                variances.append(clustered_mean(differences, range(len(differences))).se ** 2 * len(differences))
    if not variances:
        return None
    points = 100 * equivalence_margin(math.sqrt(mean(variances)), WORLDS_OF_MARGIN)
    return max(SMALLEST_MARGIN, math.ceil(points - 1e-9))


# ---- strata


def strata_gains(results: DesignResults, name: Name, pairs: str, objective: str) -> dict[str, float] | None:
    """Return the mean gain over worlds by stratum, at the selected setting; None if a run is missing."""
    if results.gains(name, pairs, objective) is None:
        return None
    setting = select(results.design, pairs, objective, results.tuning, results.rows)
    assert setting
    values: dict[str, list[float]] = {}
    for world in results.tested(name):
        run = results.design.run(world, pairs, objective, setting.learning_rate)
        row = results.rows[run.key]
        first, last = row["checkpoints"][0]["right"], at_epoch(row, setting.epoch)["right"]
        for template, initial, final in zip(TEMPLATES, first, last, strict=True):
            values.setdefault(stratum(template, run.seed), []).append((int(final, 16) - int(initial, 16)) / 15)
    return {name: mean(items) for name, items in sorted(values.items())}
