"""What a person sees of an evaluation in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from apo.evaluation.results import Interval, Results, Split

_SPLITS: tuple[tuple[str, Split], ...] = (("free_form", "free-form"), ("multiple_choice", "multiple-choice"))


def score_table(results: Results) -> Table:
    """The score of each split and benchmark in per cent, with its interval, and what it rests on."""
    score = results.score
    judge = score.judge.model or "rule parser"
    title = f"{score.model.name}: MixEval-{score.split.capitalize()} {score.version}, {score.profile}, judge {judge}"
    table = Table("", "score", "95 % interval", "items,\nquestions,\nclusters", "unresolved", title=title)
    table.add_row("overall", *_row(score.overall, score.intervals["overall"], score.unresolved), end_section=True)
    for part, split in _SPLITS:
        parts = score.by_benchmark.get(split, {})
        unresolved = sum(benchmark.unresolved for benchmark in parts.values())
        table.add_row(split, *_row(getattr(score, part), score.intervals[part], unresolved))
        for name, benchmark in parts.items():
            row = (_percent(benchmark.score), "", str(benchmark.n), str(benchmark.unresolved))
            table.add_row(f"  {name}", *row)
        table.add_section()
    return table


def _row(value: float | None, interval: Interval, unresolved: int) -> tuple[str, ...]:
    of = f"{interval.n}, {interval.questions}, {interval.clusters or interval.questions}"
    if value is None:
        return ("bracket", _range(interval.bracket), of, str(unresolved))
    return (_percent(value), _range(interval.ci95), of, str(unresolved))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _range(interval: Sequence[float] | None) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The differences of a comparison in points, of every tuned model: over all rows, and below it of each split.

    At 80 columns no word or number of it is cut; a name too long for its column goes on in the next line.
    """
    base = comparison["base"]["name"]
    title = (
        f"Tuned minus {base}, points; {comparison['rows']:,} rows of {comparison['questions']:,} questions, "
        f"{comparison['clusters']:,} clusters"
    )
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)
    widest = {"95 % interval": len("+10.0 to +12.5")}  # why there is none may be longer
    for head in ("", "score", "delta", "95 % interval", "p", "corrected", "better,\nworse"):
        table.add_column(head, overflow="fold", max_width=widest.get(head))
    for place, model in enumerate(comparison["tuned"]):
        for part in comparison["parts"]:
            if part["level"] == "benchmark":
                continue
            one = part["tuned"][place]
            table.add_row(
                model["name"] if part["level"] == "overall" else f"  {part['split']}",
                f"{100 * one['score']:.1f}",
                f"{100 * one['delta']:+.1f}",
                _points(one["delta_ci95"]) or one["no_interval"],
                *(_chance(one[p]) for p in ("p", "p_holm")),
                f"{one['better']}, {one['worse']}",
            )
        table.add_section()
    return table


def comparison_words(comparison: Mapping[str, Any]) -> Iterator[str]:
    """What beside the table has to be said: what is unresolved, the bias of choosing the best, what could be seen."""
    base, overall = comparison["base"], comparison["parts"][0]
    if comparison["left_out"]:
        yield f"{comparison['left_out']} rows were refused by a server: they are in the brackets only."
    for model, one in zip(comparison["tuned"], overall["tuned"], strict=True):
        if model["same_answers"]:
            yield f"{model['name']} gives the same answers as {base['name']}, word for word: is it the same model?"
        elif not one["better"] and not one["worse"]:
            yield f"{model['name']}: no score differs from {base['name']}'s, so there is nothing to compare."
        if one.get("p_sign") is not None:
            yield (
                f"{model['name']}: {one['differing']} questions or passages differ, too few for a t-test alone; p is "
                f"the larger of its own and that of the exact sign test, {_chance(one['p_sign'])}."
            )
        low, high = one["delta_bracket"]
        if high - low > 1e-12:
            flips = one["p_holm"] is not None and one["p_holm"] < 0.05 and low <= 0 <= high
            yield (
                f"{model['name']}: {base['unresolved']} items of {base['name']} and {model['unresolved']} of its own "
                f"are unresolved; were they wrong or right, delta would be anything from {_points((low, high))}"
                f"{': they decide whether there is a difference' if flips else ''}."
            )
    if best := comparison["best"]:
        delta, bias, left = (f"{100 * best[key]:.1f}" for key in ("delta", "selection_bias", "corrected"))
        yield (
            f"The best of {best['of']}, {best['name']}, leads by {delta} points, of which choosing the best accounts "
            f"for about {bias}; corrected {left}, 95 % interval {_points(best['ci95'])}."
        )
    for model, power in zip(comparison["tuned"], comparison["power"], strict=True):
        if power:
            told = [f"{100 * power[key]:.1f}" for key in ("detectable", "difference")]
            yield (
                f"{model['name']}: a true difference of {told[0]} points is found 8 times of 10, one of {told[1]} "
                f"{10 * power['power']:.1f} times; to see that one takes about {power['questions_needed']:,} questions."
            )


def winrate_table(result: Mapping[str, Any]) -> Table:
    """The numbers of `apo eval winrate`, each with its 95 % interval."""
    names = (result["tuned"]["name"], result["base"]["name"], result["judge"]["name"])
    title = "{} against {}, judge {}; {:,} comparisons".format(*names, result["comparisons"])
    table = Table("", "mean", "95 % interval", title=title)
    if result["win_rate"] is None:
        table.add_row("win rate, %", "bracket", _range(result["bracket"]))
    else:
        table.add_row("win rate, %", *_share(result["win_rate"]))
    controlled = result["length_controlled"]
    if controlled["rate"] is None:
        table.add_row("  at equal lengths, %", "", controlled["why"])
    else:
        table.add_row("  at equal lengths, %", *_share({"mean": controlled["rate"], "ci95": controlled["ci95"]}))
    table.add_row("won, tied, lost", f"{result['won']:,}, {result['tied']:,}, {result['lost']:,}", "")
    if cut_off := sum(result["truncated"].values()):
        table.add_row("answers cut off", f"{cut_off:,}", f"rate {_range(result['bracket'])}")
    if result["resolved"] < result["comparisons"]:
        told = ", ".join(f"{count} {reason}" for reason, count in result["unresolved"].items())
        unresolved = f"{result['comparisons'] - result['resolved']:,}"
        table.add_row("unresolved", unresolved, f"{told}; rate {_range(result['bracket'])}")
    table.add_section()
    table.add_row("length ratio, tuned / base", f"{result['length']['ratio'] or 0:.2f}", "")
    if result["consistency"]:
        table.add_row("verdicts that agree, %", *_share(result["consistency"]))
    if position := result["position"]:
        told = {"mean": position["share_first"], "ci95": position["ci95"]}
        table.add_row("prefers what is shown first, %", *_share(told))
    return table


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
    for side, found in result["displacement"].items():
        table.add_row(f"{side}: log-ratio, nats", *_number(found["logratio"]))
        table.add_row("  of shared tokens", *_number(found["logratio_shared"]))
        table.add_row("  of edited tokens", *_number(found["logratio_edited"]))
        table.add_row("  falls, % of pairs", *_share(found["falls"]))
        table.add_row("  KL, nats a token", *_number(result["kl"][side]["token"]), end_section=True)
    return table


def _share(told: Mapping[str, Any]) -> tuple[str, str]:
    return _percent(told["mean"]), _range(told["ci95"])


def _number(told: Mapping[str, Any]) -> tuple[str, str]:
    interval = told["ci95"]
    return f"{told['mean']:.4g}", f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def _points(interval: Sequence[float] | None) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}" if interval else ""


def _chance(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
