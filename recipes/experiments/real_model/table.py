"""Collect the results of a run, and write docs/real_model_results.md from those of all runs.

    python -m recipes.experiments.real_model.table --out FOLDER --collect 2   # FOLDER -> results/run-2.json
    python -m recipes.experiments.real_model.table                          # prints the results; --write: into the page

A run is one folder: it has a base, cells and pairs of its own. Its file holds the source of every number: 1 or 0 per
prompt and model, the tokens of each answer, comparisons with intervals, counts of pairs and drops, validation scores,
seconds and memory of each step, and five answers before and after the primary cell, if the run has it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import read_json, write_atomically, write_json
from clair.core.statistics import holm, paired_difference
from recipes.experiments.paper_mini import results as lines
from recipes.experiments.real_model.cells import CELLS, PRIMARY
from recipes.world.running import ROOT

COMMITTED = Path("recipes/experiments/real_model/results")
PAGE = Path("docs/real_model_results.md")
ANSWERS = 5
SHOWN_CHARACTERS = 240


# ---- from the folder


def collect(out: Path) -> dict[str, Any]:
    """Collect the results from the folder of a run. Raises UserError if no cell has answered IFEval."""
    from apo.evaluation.results import read_results

    evaluations: dict[str, dict[str, Any]] = {"ifeval": {}, "mixeval": {}}
    for benchmark, models in evaluations.items():
        for name in ("base", *(cell.name for cell in CELLS)):
            folder = out / "evals" / benchmark / name
            if (folder / "score.json").exists():
                result = read_results(folder)
                models[name] = {
                    "scores": "".join(str(round(item.score)) for item in result.items)
                    if benchmark == "ifeval"
                    else [round(item.score, 3) for item in result.items],
                    "tokens": [item.completion_tokens for item in result.items],
                    "truncated": result.score.truncated,
                    "reported": dict(result.score.reported),
                    "versions": dict(result.score.versions),
                    "git_commit": result.score.git_commit,
                }
    if len(evaluations["ifeval"]) < 2 or "base" not in evaluations["ifeval"]:
        raise UserError(f"{out} has no answers of the base and a cell to IFEval; run the experiment first")
    chosen = read_json(out / "chosen.json")
    pairs = {cell.pairs: out / "pairs" / cell.pairs for cell in CELLS}
    keys = ("step", "seconds", "cpu_seconds", "peak_mib")
    return {
        "split": read_json(out / "prompts" / "split.json"),
        "pairs": {name: _pairs(folder) for name, folder in pairs.items() if (folder / "manifest.json").exists()},
        "chosen": {name: _relative(choice, out) for name, choice in chosen.items()},
        "evaluations": evaluations,
        "compared": {name: _compared(out / "evals" / name / "compare" / "compare.json") for name in evaluations},
        "moved": {name: _moved(Path(choice["model"])) for name, choice in chosen.items()},
        "steps": [{key: line[key] for key in keys} for line in lines.read(out / "steps.jsonl")],
        "answers": _answers(out) if PRIMARY.name in evaluations["ifeval"] else [],
    }


def _relative(choice: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return a choice with the models' folders relative to the folder of the run."""
    candidates = [{**c, "model": os.path.relpath(c["model"], out)} for c in choice["candidates"]]
    return {**choice, "model": os.path.relpath(choice["model"], out), "candidates": candidates}


def _pairs(folder: Path) -> dict[str, Any]:
    """Return the manifest's counts, and the drops by stage, reason and, if the program refused, its reason."""
    drops: Counter[str] = Counter()
    for text in (folder / "dropped.jsonl").read_text("utf-8").splitlines():
        drop = json.loads(text)
        by_program = (drop["stage"], drop["reason"]) == ("reviser", "refusal")  # else the detail is a model's text
        refusal = drop["detail"].rpartition(": ")[2] if by_program else ""
        drops["/".join(filter(None, (drop["stage"], drop["reason"], refusal)))] += 1
    return {"counts": read_json(folder / "manifest.json")["counts"], "drops": dict(drops.most_common())}


def _compared(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    content = read_json(file)
    sections = [section for section in content["parts"] if section["level"] != "benchmark"]
    return {"names": [model["name"] for model in content["tuned"]], "sections": sections, "power": content["power"]}


def _moved(model: Path) -> dict[str, float]:
    """Return the log-ratios of held-out pairs at the chosen checkpoint, in nats."""
    from apo.run_dir.checkpoints import checkpoint_step
    from apo.run_dir.files import read_log

    names = ("eval_logratios/chosen", "eval_logratios/rejected", "eval_chosen_falls", "eval_rewards/accuracies")
    for row in read_log(model.parent / "metrics.jsonl"):
        if row.get("step") == checkpoint_step(model) and "eval_loss" in row:
            return {name.removeprefix("eval_"): row[name] for name in names if name in row}
    return {}


def _answers(out: Path) -> list[dict[str, str]]:
    """Return five prompts, evenly spread over the benchmark, with the answers before and after training."""
    from apo.evaluation.results import read_results

    base, tuned = (read_results(out / "evals" / "ifeval" / name).items for name in ("base", PRIMARY.name))
    return [
        {
            "prompt": base[index].prompt,
            **{"before": base[index].response, "after": tuned[index].response},
            **{"before_held": base[index].judgement, "after_held": tuned[index].judgement},
        }
        for index in (index * len(base) // ANSWERS for index in range(ANSWERS))
    ]


# ---- the page


Runs = Mapping[int, Mapping[str, Any]]
"""Results by the number of their run."""


def read_runs(folder: Path) -> dict[int, dict[str, Any]]:
    """Read the committed results, by the number of their run."""
    return {int(file.stem.removeprefix("run-")): read_json(file) for file in sorted(folder.glob("run-*.json"))}


def page(runs: Runs) -> str:
    """Return the text of the page."""
    return "\n".join(
        [
            "# Results on a real model",
            "",
            "The figures behind [a real model, measured on IFEval](real_model.md), which says what they mean.",
            "`python -m recipes.experiments.real_model.table --write` makes this page from",
            f"`{COMMITTED}`. Differences are in points, with 95 % intervals. Each run has a base,",
            "pairs and cells of its own.",
            *_benchmark(runs, "ifeval", "IFEval, prompts whose instructions are all followed, loosely"),
            *_contrasts(runs),
            *_measures(runs),
            *_by_type(runs),
            *_benchmark(runs, "mixeval", "MixEval-Hard, by rules"),
            *_pair_table(runs),
            *_choices(runs),
            *_lengths(runs),
            *_costs(runs),
            *_shown(runs),
            "",
        ]
    )


def _heading(title: str, *head: str) -> list[str]:
    return ["", f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _percent(section: Mapping[str, Any]) -> str:
    return f"{100 * section['score']:.1f} {_interval(section['ci95'], sign='')}".rstrip()


def _interval(values: Sequence[float] | None, sign: str = "+") -> str:
    return f"[{100 * values[0]:{sign}.1f}, {100 * values[1]:{sign}.1f}]" if values else ""


def _delta(tuned: Mapping[str, Any]) -> str:
    return f"{100 * tuned['delta']:+.1f} {_interval(tuned['delta_ci95'])}".rstrip()


def _p(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _benchmark(runs: Runs, benchmark: str, title: str) -> Iterator[str]:
    """The cells of all runs, each against the base of its run; Holm's correction is over all of them."""
    compared = {run: results["compared"][benchmark] for run, results in runs.items()}
    rows = [
        (run, name, tuned)
        for run, comparison in compared.items()
        if comparison
        for name, tuned in zip(comparison["names"], comparison["sections"][0]["tuned"], strict=True)
    ]
    if not rows:
        return
    heads = ("run", "model", "score, %", "against the base", "p", "p, Holm", "better, worse", "answers cut")
    yield from _heading(title, *heads)
    adjusted = iter(holm([math.nan if tuned["p"] is None else tuned["p"] for _, _, tuned in rows]))
    for run, comparison in compared.items():
        cut = {name: model["truncated"] for name, model in runs[run]["evaluations"][benchmark].items()}
        if comparison:
            yield _row(run, "base", _percent(comparison["sections"][0]["base"]), "", "", "", "", cut["base"])
        for _, name, tuned in (row for row in rows if row[0] == run):
            counts = f"{tuned['better']}, {tuned['worse']}"
            yield _row(run, name, _percent(tuned), _delta(tuned), _p(tuned["p"]), _p(next(adjusted)), counts, cut[name])


def _contrasts(runs: Runs) -> Iterator[str]:
    """The primary cell minus each other one, by prompt. Not planned, so without corrected p-values.

    A run without the primary cell is compared with that of another run whose base follows the same prompts.
    """
    rows, primary = [], {}
    for results in runs.values():
        models = results["evaluations"]["ifeval"]
        if PRIMARY.name in models:
            primary.setdefault(models["base"]["scores"], models[PRIMARY.name]["scores"])
    for run, results in runs.items():
        models = results["evaluations"]["ifeval"]
        reference = models[PRIMARY.name]["scores"] if PRIMARY.name in models else primary.get(models["base"]["scores"])
        for cell in CELLS:
            if reference and cell != PRIMARY and cell.name in models:
                theirs, ours = ([*map(int, scores)] for scores in (models[cell.name]["scores"], reference))
                difference = paired_difference(theirs, ours, range(len(ours)))
                mean = f"{100 * difference.estimate.mean:+.1f} {_interval(difference.interval)}".rstrip()
                rows.append(_row(run, cell.name, mean, f"{difference.better}, {difference.worse}"))
    if rows:
        yield from _heading(f"{PRIMARY.name} minus the other cells", "run", "cell", "difference", "better, worse")
        yield from rows


def _measures(runs: Runs) -> Iterator[str]:
    """The primary cell by measure, and by types that occur in training and that do not."""
    yield from _heading("The primary cell by measure", "run", "measure", "cases", "base, %", "after, %", "difference")
    for run, results in runs.items():
        compared = results["compared"]["ifeval"]
        if PRIMARY.name not in compared["names"]:
            continue
        index = compared["names"].index(PRIMARY.name)
        for section in compared["sections"]:
            tuned, name = section["tuned"][index], section["split"] or "prompt_loose"
            label = f"{name.replace('_', ', ')}{', types ' + section['benchmark'] if section['benchmark'] else ''}"
            yield _row(run, label, section["rows"], _percent(section["base"]), _percent(tuned), _delta(tuned))


def _by_type(runs: Runs) -> Iterator[str]:
    """Each cell's gain on the types of constraint that occur in training and on those that do not."""
    yield from _heading("Instructions, loosely, by type", "run", "cell", "types seen", "types unseen")
    for run, results in runs.items():
        compared = results["compared"]["ifeval"]
        sections = {section["benchmark"]: section["tuned"] for section in compared["sections"]}
        for index, name in enumerate(compared["names"]):
            gains = (_delta(sections[kind][index]) if kind in sections else "" for kind in ("seen", "unseen"))
            yield _row(run, name, *gains)


def _pair_table(runs: Runs) -> Iterator[str]:
    yield from _heading("Pairs", "run", "pairs", "prompts", "pairs made", "dropped, by stage and reason")
    for run, results in runs.items():
        for name, pairs in results["pairs"].items():
            drops = ", ".join(f"{reason} {count}" for reason, count in pairs["drops"].items())
            counts = pairs["counts"]
            yield _row(run, name, counts["pairs"] + counts["dropped"], counts["pairs"], drops)


def _choices(runs: Runs) -> Iterator[str]:
    title = "Rate and epochs, chosen on validation prompts"
    yield from _heading(title, "run", "cell", "rate, epochs: prompts followed loosely, %", "chosen")
    for run, results in runs.items():
        for name, choice in results["chosen"].items():
            tried = (f"{c['rate']:g}, {c['epochs']}: {100 * c['validation']:.1f}" for c in choice["candidates"])
            yield _row(run, name, ", ".join(tried), f"{choice['rate']:g}, {choice['epochs']}")


def _lengths(runs: Runs) -> Iterator[str]:
    heads = ("run", "model", "tokens an answer to IFEval", "log-ratio of chosen, nats", "of rejected")
    yield from _heading("Length, and what training moved on held-out pairs", *heads, "chosen that fell, %")
    for run, results in runs.items():
        for name, model in results["evaluations"]["ifeval"].items():
            tokens = [count for count in model["tokens"] if count is not None]
            moved = results["moved"].get(name, {})
            keys = ("logratios/chosen", "logratios/rejected")
            ratios = [f"{moved[key]:+.1f}" if key in moved else "" for key in keys]
            falls = f"{100 * moved['chosen_falls']:.0f}" if "chosen_falls" in moved else ""
            yield _row(run, name, f"{sum(tokens) / len(tokens):.0f}" if tokens else "", *ratios, falls)


def _costs(runs: Runs) -> Iterator[str]:
    """The processor time of each model's steps by kind, and of each set of pairs."""
    kinds = {"pairs": "pairs", "train": "training", "answers": "validation", "IFEval": "IFEval", "MixEval": "MixEval"}
    heads = ("run", "of", *kinds.values(), "all", "wall minutes", "peak memory, MiB")
    yield from _heading("Processor minutes and memory", *heads)
    for run, results in runs.items():
        groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        for step in results["steps"]:
            kind, name = step["step"].replace("answers IFEval", "IFEval").split(" ")[:2]
            groups.setdefault(name.partition("/")[0], []).append((kind, step))
        for name, steps in {**groups, "all": [*chain.from_iterable(groups.values())]}.items():
            by_kind = [[step for kind, step in steps if kind == column] for column in kinds]
            everything = [step for _, step in steps]
            cells = [_minutes(chosen, "cpu_seconds") for chosen in (*by_kind, everything)]
            yield _row(run, name, *cells, _minutes(everything, "seconds"), max(step["peak_mib"] for step in everything))


def _minutes(steps: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{sum(step[key] for step in steps) / 60:.1f}" if steps else ""


def _shown(runs: Runs) -> Iterator[str]:
    """Answers of the first run that has the primary cell."""
    results = next(results for results in runs.values() if results["answers"])
    count = len(results["evaluations"]["ifeval"]["base"]["scores"]) // ANSWERS
    yield from ("", f"## Five answers, every {count}th prompt")
    for answer in results["answers"]:
        yield from ("", "```text", f"PROMPT  {_clipped(answer['prompt'])}", "")
        for name in ("before", "after"):
            yield from (f"{name.upper()}  {_clipped(answer[name])}", *answer[f"{name}_held"].split("\n"), "")
        yield "```"


def _clipped(text: str) -> str:
    shown = text.replace("```", "'''").strip()
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]} ... ({len(shown)} characters)"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/real_model_results.md.")
    parser.add_argument("--out", type=Path, help="the folder of a run; for --collect")
    parser.add_argument("--collect", type=int, metavar="RUN", help=f"read --out, and write {COMMITTED}/run-RUN.json")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    args = parser.parse_args()
    if (args.collect is None) != (args.out is None):
        parser.error("--collect and --out need each other: the number and the folder of a run")
    out = args.out.resolve() if args.out else None
    os.chdir(ROOT)
    try:
        if out is not None:
            write_json(COMMITTED / f"run-{args.collect}.json", collect(out))
        text = page(read_runs(COMMITTED))
    except UserError as error:
        raise SystemExit(f"real: {error}") from None
    print(text)
    if args.write:
        write_atomically(PAGE, text)


if __name__ == "__main__":
    main()
