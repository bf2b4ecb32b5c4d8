"""The rows of the mini grid's tables, as text, from its results."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from clair.core.statistics import Estimate, best_of, clustered_mean
from recipes.experiments.paper_mini.cells import Design, last_accuracy
from recipes.experiments.paper_mini.claims import (
    AFTERWARDS,
    CLAIMS,
    Claim,
    Compared,
    Name,
    Verdict,
    compare,
    gains,
    interval,
    maximum_difference,
    mean_of,
    right_of,
    verdict_of,
)

Runs = Sequence[Mapping[str, Any]]


def cells_of(runs: Mapping[str, Mapping[str, Any]]) -> dict[Name, list[Mapping[str, Any]]]:
    """The grid's runs by data set and objective, in order of seeds, without tuning runs."""
    result: dict[Name, list[Mapping[str, Any]]] = defaultdict(list)
    for run in sorted(runs.values(), key=lambda run: run["seed"]):
        if run["purpose"] == "grid":
            result[run["data"], run["objective"]].append(run)
    return dict(result)


def design_of(world: Mapping[str, Any]) -> Design:
    """The design of the grid that made the results."""
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in world["design"].items()}
    return Design(**values)


def base_of(world: Mapping[str, Any]) -> list[float]:
    """The scores of the model before training by question: 1.0 right, 0.0 wrong."""
    return [float(c) for c in world["base"]["right"]]


# ---- tables, as rows of texts; the first row is the heading


def points(value: float) -> str:
    """A fraction as points, with its sign."""
    return f"{100 * value:+.1f}"


def with_interval(estimate: Estimate) -> str:
    """Fractions as points: `+7.1 [+4.0, +10.2]`; `+7.1 [no interval]` if no error can be estimated."""
    if math.isnan(estimate.se):
        return f"{points(estimate.mean)} [no interval]"
    return f"{points(estimate.mean)} [{points(estimate.lo)}, {points(estimate.hi)}]"


def in_nats(estimate: Estimate) -> str:
    """`+7.12 [+4.03, +10.21]`."""
    return f"{estimate.mean:+.2f} [{estimate.lo:+.2f}, {estimate.hi:+.2f}]"


def gain_rows(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[list[str]]:
    """The gain of each cell over the untrained model: mean, maximum, and corrected maximum over checkpoints."""
    base, clusters = base_of(world), world["templates"]
    rows = [["pairs", "objective", "seeds", "mean", "maximum", "maximum, corrected", "lr", "beta"]]
    for (data, objective), runs in cells.items():
        by_seed = right_of(runs)
        if not by_seed:
            rows.append([data, objective, "0", *["broke off"] * 3, *_tuned(runs)])
            continue
        of_checkpoint = [mean_of(rows) for rows in zip(*by_seed, strict=True)]
        differences = [[a - b for a, b in zip(values, base, strict=True)] for values in of_checkpoint]
        mean = with_interval(interval(gains(runs, None, base), clusters))
        rows.append([data, objective, str(len(by_seed)), mean, *_maximum(differences, clusters), *_tuned(runs)])
    return rows


def _maximum(differences: Sequence[Sequence[float]], clusters: Sequence[str]) -> list[str]:
    """The maximum over checkpoints, uncorrected and corrected for the choice; a single checkpoint has no choice."""
    if len(differences) == 1:
        only = clustered_mean(differences[0], clusters)
        return [points(only.mean), with_interval(only)]
    best = best_of(differences, clusters)
    return [points(best.observed), f"{points(best.corrected)} [{points(best.lo)}, {points(best.hi)}]"]


def _tuned(runs: Runs) -> list[str]:
    return [f"{runs[0]['learning_rate']:g}", f"{runs[0]['beta']:g}"]


def rate_rows(runs: Mapping[str, Mapping[str, Any]], rates: Sequence[float]) -> list[list[str]]:
    """The runs that tuned the learning rate: per cent right at the end, and the change of chosen answers in nats."""
    tried = {
        (run["data"], run["objective"], run["learning_rate"]): run
        for run in runs.values()
        if run["purpose"] == "learning_rate"
    }
    rows = [["pairs", "objective", *(f"{rate:g}" for rate in rates)]]
    for data, objective in dict.fromkeys(key[:2] for key in tried):
        rows.append([data, objective, *(_tried(tried.get((data, objective, rate))) for rate in rates)])
    return rows


def _tried(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return ""
    if not run["checkpoints"]:
        return "broke off"
    moved = run["checkpoints"][-1]["pairs"]["logps/chosen"] - run["start"]["logps/chosen"]
    return f"{100 * last_accuracy(run):.1f} ({moved:+.1f})"


def answer_rows(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[list[str]]:
    """The answers of the last checkpoint by skill, style and length; the untrained model first."""
    skills = list(dict.fromkeys(world["skills"]))
    rows = [["pairs", "objective", *skills, "engaging", "plain", "padded", "words"]]
    rows.append(["", "before", *_answers([world["base"]], world["skills"], skills)])
    for (data, objective), runs in cells.items():
        if last := [run["checkpoints"][-1] for run in runs if run["checkpoints"]]:
            rows.append([data, objective, *_answers(last, world["skills"], skills)])
    return rows


def _answers(
    checkpoints: Sequence[Mapping[str, Any]], skill_of_task: Sequence[str], skills: Sequence[str]
) -> list[str]:
    right = mean_of([[float(c) for c in checkpoint["right"]] for checkpoint in checkpoints])
    words = math.fsum(checkpoint["words"] for checkpoint in checkpoints) / len(checkpoints)
    letters = "".join(checkpoint["wording"] for checkpoint in checkpoints)
    by_skill = [[value for value, skill in zip(right, skill_of_task, strict=True) if skill == name] for name in skills]
    shares = [letters.count(letter) / len(letters) for letter in "epd"]
    return [*(f"{100 * sum(v) / len(v):.1f}" for v in by_skill), *(f"{share:.0%}" for share in shares), f"{words:.1f}"]


def per_pair_metrics(cells: Mapping[Name, Runs]) -> list[list[str]]:
    """Held-out pairs at the last checkpoint: reward accuracy, margin, displacement and KL.

    Accuracy and margin have intervals over seeds and pairs. Displacement is the change of chosen and rejected answers,
    of all tokens, shared tokens and edited tokens.
    """
    head = [
        "pairs",
        "objective",
        "reward accuracy",
        "margin",
        "winner",
        "shared",
        "edited",
        "loser",
        "shared",
        "edited",
    ]
    rows = [[*head, "winners that fall", "KL of winners"]]
    for (data, objective), runs in cells.items():
        if moved := [run["moved"] for run in runs if run["checkpoints"]]:
            beta, pairs = runs[0]["beta"], range(len(moved[0]["chosen_logratio"]))
            accuracy = interval([[_order(*pair) for pair in _both(run, "logratio")] for run in moved], pairs)
            margin = interval([[beta * (w - lo) for w, lo in _both(run, "logratio")] for run in moved], pairs)
            falls = _mean([float(value < 0) for run in moved for value in run["chosen_logratio"]])
            kl = _mean([value for run in moved for value in run["chosen_kl"]])
            rows.append(
                [
                    data,
                    objective,
                    f"{accuracy.mean:.0%} [{accuracy.lo:.0%}, {min(1.0, accuracy.hi):.0%}]",
                    in_nats(margin),
                    *_displaced(moved, "chosen"),
                    *_displaced(moved, "rejected"),
                    f"{falls:.0%}",
                    f"{kl:.2f}",
                ]
            )
    return rows


def _both(moved: Mapping[str, Sequence[float]], of: str) -> list[tuple[float, float]]:
    """A metric of the chosen and the rejected answer of each pair."""
    return list(zip(moved[f"chosen_{of}"], moved[f"rejected_{of}"], strict=True))


def _order(winner: float, loser: float) -> float:
    return 0.5 if winner == loser else float(winner > loser)


def _displaced(moved: Sequence[Mapping[str, Sequence[float]]], side: str) -> list[str]:
    """Nats per response: all tokens, shared tokens, edited tokens."""
    total = _mean([value for run in moved for value in run[f"{side}_logratio"]])
    shared = _mean([value for run in moved for value in run[f"{side}_logratio_shared"]])
    return [f"{value:+.2f}" for value in (total, shared, total - shared)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def contrast_rows(world: Mapping[str, Any]) -> list[list[str]]:
    """The data sets side by side."""
    rows = [["pairs", "train", "held out", "response tokens", "Jaccard", "Levenshtein", "length ratio"]]
    for name, dataset in world["data"].items():
        contrast = dataset["contrast"]
        numbers = [f"{contrast['jaccard']:.2f}", f"{contrast['levenshtein']:.1f}", f"{contrast['length_ratio']:.2f}"]
        rows.append([name, str(dataset["train"]), str(dataset["test"]), str(dataset["train_tokens"]), *numbers])
    return rows


Judged = tuple[Claim, list[Estimate | None], Verdict]


def judged(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[Judged]:
    """Each claim with the estimates of its comparisons and its verdict."""
    result = []
    for claim in CLAIMS:
        figures = [compare(comparison, cells, base_of(world), world["templates"]) for comparison in claim.compared]
        result.append((claim, figures, verdict_of(claim, figures)))
    return result


def afterwards_rows(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[list[str]]:
    """Comparisons that were added after the results were known."""
    rows = [["pairs", "SFT − APO-zero, points", "by the maxima"]]
    for comparison in AFTERWARDS:
        if estimate := compare(comparison, cells, base_of(world), world["templates"]):
            rows.append([comparison.left[0], with_interval(estimate), _maxima(comparison, cells, world)])
    return rows


def verdict_rows(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[list[str]]:
    """The paper's claims: our estimates with their verdict, and the same by each cell's best checkpoint."""
    rows = [["claim", "compared", "figure", "by the maxima", "verdict"]]
    for claim, figures, verdict in judged(cells, world):
        for index, (comparison, estimate) in enumerate(zip(claim.compared, figures, strict=True)):
            to_text = with_interval if comparison.of == "accuracy" else in_nats
            figure = "–" if estimate is None else to_text(estimate)
            maxima = _maxima(comparison, cells, world) if estimate is not None and comparison.of == "accuracy" else "–"
            first = index == 0
            rows.append(
                [claim.text if first else "", _comparison_text(comparison), figure, maxima, verdict if first else ""]
            )
    return rows


def _maxima(comparison: Compared, cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> str:
    return points(
        maximum_difference(
            cells[comparison.left], cells[comparison.right] if comparison.right else None, base_of(world)
        )
    )


def _comparison_text(comparison: Compared) -> str:
    left, right = ("before" if name is None else " ".join(name) for name in (comparison.left, comparison.right))
    unit = "points" if comparison.of == "accuracy" else "nats a winner"
    return f"{left} − {right}, {unit}; expected {'above' if comparison.above else 'below'} 0"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
