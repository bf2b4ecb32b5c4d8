"""Results of evaluations as tables and notes for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from apo.evaluation.records.benchmark import ScoreInterval
from apo.evaluation.records.ifeval import MEASURES, IFEvalScore, InstructionScore
from apo.evaluation.records.mixeval import MixEvalScore, Split
from apo.evaluation.results import Results

_SPLITS: tuple[tuple[Literal["free_form", "multiple_choice"], Split], ...] = (
    ("free_form", "free-form"),
    ("multiple_choice", "multiple-choice"),
)


def score_table(results: Results) -> Table:
    """The scores of a result in per cent, with intervals and counts."""
    return _ifeval_table(results.score) if isinstance(results.score, IFEvalScore) else _mixeval_table(results.score)


def _mixeval_table(score: MixEvalScore) -> Table:
    """The score of each split and benchmark."""
    judge = score.judge.model or "rule parser"
    title = f"{score.model.name}: MixEval-{score.split.capitalize()} {score.version}, {score.profile}, judge {judge}"
    table = Table("", "score", "95 % interval", "items,\nquestions,\nclusters", "unresolved", title=title)
    table.add_row("overall", *_row(score.overall, score.intervals["overall"], score.unresolved), end_section=True)
    for field, split in _SPLITS:
        benchmarks = score.by_benchmark.get(split, {})
        unresolved = sum(benchmark.unresolved for benchmark in benchmarks.values())
        table.add_row(split, *_row(getattr(score, field), score.intervals[field], unresolved))
        for name, benchmark in benchmarks.items():
            row = (percent(benchmark.score), "", str(benchmark.n), str(benchmark.unresolved))
            table.add_row(f"  {name}", *row)
        table.add_section()
    return table


def _ifeval_table(score: IFEvalScore) -> Table:
    """The shares of prompts and instructions, then of groups and types of instructions."""
    heads = ("", "loose", "95 % interval", "strict", "95 % interval", "n")
    table = wide_table(f"{score.model.name}: IFEval, % followed", heads)
    intervals = score.intervals
    levels = {
        "prompts": InstructionScore(loose=intervals["prompt_loose"], strict=intervals["prompt_strict"]),
        "instructions": InstructionScore(loose=intervals["instruction_loose"], strict=intervals["instruction_strict"]),
    }
    for section in (levels, score.by_group, score.by_type):
        for name, numbers in section.items():
            table.add_row(
                name,
                *_cells(numbers.loose.mean, numbers.loose),
                *_cells(numbers.strict.mean, numbers.strict),
                f"{numbers.loose.n:,}",
            )
        table.add_section()
    return table


def wide_table(title: str, heads: Sequence[str]) -> Table:
    """Return a table without edges, whose cells wrap instead of being cut."""
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _cells(value: float | None, interval: ScoreInterval) -> tuple[str, str]:
    if value is None:
        return ("bracket", percent_range(interval.bracket))
    return (percent(value), percent_range(interval.ci95))


def _row(value: float | None, interval: ScoreInterval, unresolved: int) -> tuple[str, ...]:
    counts = f"{interval.n}, {interval.questions}, {interval.clusters or interval.questions}"
    return (*_cells(value, interval), counts, str(unresolved))


def percent(value: float | None) -> str:
    """Return a share in per cent, or nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


def percent_range(interval: Sequence[float] | None) -> str:
    """Return an interval of a share in per cent, or nothing for None."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The differences of a comparison in points: for each tuned model over all rows, then for each split.

    At 80 columns no word or number is cut; a name too long for its column wraps.
    """
    base = comparison["base"]["name"]
    title = (
        f"Tuned minus {base}, points; {comparison['rows']:,} rows of {comparison['questions']:,} questions, "
        f"{comparison['clusters']:,} clusters"
    )
    table = wide_table(title, ("", "score", "delta", "95 % interval", "p", "corrected", "better,\nworse"))
    table.columns[3].max_width = len("+10.0 to +12.5")  # a reason for its absence may be longer
    for index, model in enumerate(comparison["tuned"]):
        for section in comparison["parts"]:
            if section["level"] == "benchmark":
                continue
            numbers = section["tuned"][index]
            name = section["benchmark"] or section["split"] or ""
            name = name.replace("_", "s, ") if name in MEASURES else name
            table.add_row(
                f"{model['name']}: {name}".removesuffix(": ") if section["level"] == "overall" else f"  {name}",
                f"{100 * numbers['score']:.1f}",
                f"{100 * numbers['delta']:+.1f}",
                point_range(numbers["delta_ci95"]) or numbers["no_interval"],
                *(_p_value(numbers[p]) for p in ("p", "p_holm")),
                f"{numbers['better']}, {numbers['worse']}",
            )
        table.add_section()
    return table


def comparison_notes(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Notes on a comparison beside its table: unresolved items, the bias of choosing the best model, power."""
    base, overall = comparison["base"], comparison["parts"][0]
    if comparison["left_out"]:
        yield f"{comparison['left_out']} rows were refused by a server: they are in the brackets only."
    for index, (model, section) in enumerate(zip(comparison["tuned"], overall["tuned"], strict=True)):
        numbers = [entry["tuned"][index] for entry in comparison["parts"]]
        if model["same_answers"]:
            yield f"{model['name']} gives the same answers as {base['name']}, word for word: is it the same model?"
        elif not any(counts["better"] or counts["worse"] for counts in numbers):
            yield f"{model['name']}: no score differs from {base['name']}'s, so there is nothing to compare."
        if section.get("p_sign") is not None:
            yield (
                f"{model['name']}: {section['differing']} questions or passages differ, too few for a t-test alone; p "
                f"is the larger of its own and that of the exact sign test, {_p_value(section['p_sign'])}."
            )
        low, high = section["delta_bracket"]
        if high - low > 1e-12:
            flips = section["p_holm"] is not None and section["p_holm"] < 0.05 and low <= 0 <= high
            yield (
                f"{model['name']}: {base['unresolved']} items of {base['name']} and {model['unresolved']} of its own "
                f"are unresolved; were they wrong or right, delta would be anything from {point_range((low, high))}"
                f"{': they decide whether there is a difference' if flips else ''}."
            )
    if best := comparison["best"]:
        delta, bias, left = (f"{100 * best[key]:.1f}" for key in ("delta", "selection_bias", "corrected"))
        yield (
            f"The best of {best['of']}, {best['name']}, leads by {delta} points, of which choosing the best accounts "
            f"for about {bias}; corrected {left}, 95 % interval {point_range(best['ci95'])}."
        )
    for model, power in zip(comparison["tuned"], comparison["power"], strict=True):
        if power:
            points = [f"{100 * power[key]:.1f}" for key in ("detectable", "difference")]
            yield (
                f"{model['name']}: a true difference of {points[0]} points is found 8 times of 10, one of {points[1]} "
                f"{10 * power['power']:.1f} times; to see that one takes about {power['questions_needed']:,} questions."
            )


def winrate_table(result: Mapping[str, Any]) -> Table:
    """The numbers of `apo eval winrate`, each with its 95 % interval."""
    names = (result["tuned"]["name"], result["base"]["name"], result["judge"]["name"])
    title = "{} against {}, judge {}; {:,} comparisons".format(*names, result["comparisons"])
    table = Table("", "mean", "95 % interval", title=title)
    if result["win_rate"] is None:
        table.add_row("win rate, %", "bracket", percent_range(result["bracket"]))
    else:
        table.add_row("win rate, %", *_share(result["win_rate"]))
    controlled = result["length_controlled"]
    if controlled["rate"] is None:
        table.add_row("  at equal lengths, %", "", controlled["why"])
    else:
        table.add_row("  at equal lengths, %", *_share({"mean": controlled["rate"], "ci95": controlled["ci95"]}))
    table.add_row("won, tied, lost", f"{result['won']:,}, {result['tied']:,}, {result['lost']:,}", "")
    if cut_off := sum(result["truncated"].values()):
        table.add_row("answers cut off", f"{cut_off:,}", f"rate {percent_range(result['bracket'])}")
    if result["resolved"] < result["comparisons"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in result["unresolved"].items())
        unresolved = f"{result['comparisons'] - result['resolved']:,}"
        table.add_row("unresolved", unresolved, f"{counts}; rate {percent_range(result['bracket'])}")
    if result["left_out"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in result["left_out"].items())
        table.add_row("prompts left out", f"{sum(result['left_out'].values()):,}", counts)
    table.add_section()
    table.add_row("length ratio, tuned / base", f"{result['length']['ratio'] or 0:.2f}", "")
    if result["consistency"]:
        table.add_row("verdicts that agree, %", *_share(result["consistency"]))
    if position := result["position"]:
        counts = {"mean": position["share_first"], "ci95": position["ci95"]}
        table.add_row("prefers what is shown first, %", *_share(counts))
    return table


def stability_table(result: Mapping[str, Any]) -> Table:
    """The numbers of `apo eval judge-stability`, in per cent or points, each with its 95 % interval."""
    title = f"{result['answers']:,} answers to {result['questions']:,} questions, judged {result['repeats']} times"
    table = Table("", "mean", "95 % interval", title=title)
    for role, judge in result["judges"].items():
        table.add_row(f"{role}: {result['judged_by'][role]['name']}", "", "")
        for name, flips in judge["flips"].items():
            table.add_row(f"  {name}: flips right and wrong, %", *_share(flips["flips"]))
        overall = judge["flips"]["overall"]
        table.add_row("  changes the score, %", *_share(overall["changes"]))
        table.add_row("  judgements all agree, %", *_share(overall["unanimous"]))
        table.add_row("  no verdict, %", percent(result["unreadable"][role]), "")
        delta = judge["difference"]
        table.add_row("  tuned minus base, points", f"{100 * delta['mean']:+.1f}", point_range(delta.get("ci95")))
        spread = min(delta["by_repeat"]), max(delta["by_repeat"])
        table.add_row("  ... of each judgement", "", point_range(spread), end_section=True)
    if between := result["between"]:
        table.add_row("between the two judges: flips, %", *_share(between["overall"]["flips"]))
        shift = between["overall"]["score_difference"]
        table.add_row("  second's scores, points", f"{100 * shift['mean']:+.1f}", point_range(shift["ci95"]))
        change = between["difference_change"]
        table.add_row(
            "  second's tuned minus base, points", f"{100 * change['mean']:+.1f}", point_range(change["ci95"])
        )
    return table


def stability_notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What each judge's instability does to the difference of the two models."""
    for role, judge in result["judges"].items():
        if not (widths := judge["difference"]["half_width"]):
            yield "all answers are to one question, so the difference has no interval"
            return
        single, several, steady = (f"{100 * widths[name]:.2f}" for name in ("one", "all", "steady"))
        widening = judge["difference"]["widening"]
        wider = "" if widening is None else f", {100 * widening:.1f} % wider than by a judge that never changes"
        yield (
            f"{role}: judged once, the difference is known to +-{single} points{wider} (+-{steady}); judged "
            f"{result['repeats']} times, to +-{several}."
        )


def pairs_table(result: Mapping[str, Any]) -> Table:
    """The numbers of `apo eval pairs`, each with its 95 % interval."""
    title = f"{result['pairs']:,} held-out pairs of {result['prompts']:,} prompts, beta {result['beta']:g}"
    table = Table("", "mean", "95 % interval", title=title)
    length = result["length_only"]
    table.add_row("reward accuracy, %", *_share(result["reward_accuracy"]))
    table.add_row("  ties, %", *_share(result["ties"]))
    table.add_row(f"  prefer the {length['prefers']}, %", *_share(length["accuracy"]))
    table.add_row("  accuracy minus that, points", *_share(length["reward_accuracy_minus_it"]), end_section=True)
    table.add_row("margin", *_number(result["margin"]))
    table.add_row("length ratio, chosen / rejected", *_number(result["length_ratio"]), end_section=True)
    for side, displacement in result["displacement"].items():
        table.add_row(f"{side}: log-ratio, nats", *_number(displacement["logratio"]))
        table.add_row("  of shared tokens", *_number(displacement["logratio_shared"]))
        table.add_row("  of edited tokens", *_number(displacement["logratio_edited"]))
        table.add_row("  falls, % of pairs", *_share(displacement["falls"]))
        table.add_row("  KL, nats a token", *_number(result["kl"][side]["token"]), end_section=True)
    return table


def _share(estimate: Mapping[str, Any]) -> tuple[str, str]:
    return percent(estimate["mean"]), percent_range(estimate["ci95"])


def _number(estimate: Mapping[str, Any]) -> tuple[str, str]:
    interval = estimate["ci95"]
    return f"{estimate['mean']:.4g}", f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def point_range(interval: Sequence[float] | None) -> str:
    """Return an interval of a difference in points, or nothing for None."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}" if interval else ""


def _p_value(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
