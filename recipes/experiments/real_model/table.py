"""Collect the results of a run, and write the results section of docs/real_model.md from them.

    python -m recipes.experiments.real_model.table --out FOLDER --collect    # FOLDER -> results/results.json
    python -m recipes.experiments.real_model.table                         # prints the results; --write: into the page

results.json holds the source of every number: 1 or 0 per prompt and model, the tokens of each answer, comparisons with
intervals, counts of pairs and drops, validation scores, seconds and memory of each step, and five answers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import read_json, write_atomically, write_json
from clair.core.statistics import paired_difference
from recipes.experiments.paper_mini import results as lines
from recipes.experiments.real_model.cells import CELLS, PRIMARY
from recipes.world.running import ROOT

COMMITTED = Path("recipes/experiments/real_model/results/results.json")
PAGE = Path("docs/real_model.md")
HEADING = "## Results\n"
ANSWERS = 5
SHOWN_CHARACTERS = 240


# ---- from the folder


def collect(out: Path) -> dict[str, Any]:
    """Collect the results from the folder of a run. Raises UserError if the primary cell is not finished."""
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
    if PRIMARY.name not in evaluations["ifeval"]:
        raise UserError(f"{out} has no answers of the primary cell to IFEval; run the experiment first")
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
        "answers": _answers(out),
    }


def _relative(choice: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return a choice with the models' folders relative to the folder of the run."""
    candidates = [{**c, "model": os.path.relpath(c["model"], out)} for c in choice["candidates"]]
    return {**choice, "model": os.path.relpath(choice["model"], out), "candidates": candidates}


def _pairs(folder: Path) -> dict[str, Any]:
    """Return the manifest's counts, and the drops by stage, reason and, for a refusal, the program's reason."""
    drops: Counter[str] = Counter()
    for text in (folder / "dropped.jsonl").read_text("utf-8").splitlines():
        drop = json.loads(text)
        refusal = drop["detail"].rpartition(": ")[2] if drop["reason"] == "refusal" else ""
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


def page(results: Mapping[str, Any]) -> str:
    """Return the text of the results section."""
    return "\n".join(
        [
            "`python -m recipes.experiments.real_model.table --write` makes this section from",
            f"`{COMMITTED}`. Differences are in points, with 95 % intervals.",
            *_benchmark(results, "ifeval", "IFEval, prompts whose instructions are all followed, loosely"),
            *_contrasts(results),
            *_measures(results),
            *_benchmark(results, "mixeval", "MixEval-Hard, by rules"),
            *_pair_table(results),
            *_choices(results),
            *_lengths(results),
            *_costs(results),
            *_shown(results),
            "",
        ]
    )


def _heading(title: str, *head: str) -> list[str]:
    return ["", f"### {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _percent(section: Mapping[str, Any]) -> str:
    return f"{100 * section['score']:.1f} {_interval(section['ci95'], sign='')}".rstrip()


def _interval(values: Sequence[float] | None, sign: str = "+") -> str:
    return f"[{100 * values[0]:{sign}.1f}, {100 * values[1]:{sign}.1f}]" if values else ""


def _delta(tuned: Mapping[str, Any]) -> str:
    return f"{100 * tuned['delta']:+.1f} {_interval(tuned['delta_ci95'])}".rstrip()


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _benchmark(results: Mapping[str, Any], benchmark: str, title: str) -> Iterator[str]:
    compared = results["compared"][benchmark]
    if compared is None:
        return
    section = compared["sections"][0]
    yield from _heading(title, "model", "score, %", "against the base", "p", "p, Holm", "better, worse", "answers cut")
    cut = {name: model["truncated"] for name, model in results["evaluations"][benchmark].items()}
    yield _row("base", _percent(section["base"]), "", "", "", "", cut["base"])
    for name, tuned in zip(compared["names"], section["tuned"], strict=True):
        counts = f"{tuned['better']}, {tuned['worse']}"
        yield _row(name, _percent(tuned), _delta(tuned), _p(tuned["p"]), _p(tuned["p_holm"]), counts, cut[name])


def _contrasts(results: Mapping[str, Any]) -> Iterator[str]:
    """The primary cell minus each other one, by prompt. Not planned beforehand, so without corrected p-values."""
    scores = {name: [*map(int, model["scores"])] for name, model in results["evaluations"]["ifeval"].items()}
    others = [cell.name for cell in CELLS if cell != PRIMARY and cell.name in scores]
    if others:
        yield from _heading(f"{PRIMARY.name} minus the other cells", "cell", "difference", "better, worse")
    for name in others:
        difference = paired_difference(scores[name], scores[PRIMARY.name], range(len(scores[name])))
        mean = f"{100 * difference.estimate.mean:+.1f} {_interval(difference.interval)}"
        yield _row(name, mean.rstrip(), f"{difference.better}, {difference.worse}")


def _measures(results: Mapping[str, Any]) -> Iterator[str]:
    """The primary cell by measure, and by types that occur in training and that do not."""
    compared = results["compared"]["ifeval"]
    index = compared["names"].index(PRIMARY.name)
    yield from _heading("The primary cell by measure", "measure", "cases", "base, %", "after, %", "difference")
    for section in compared["sections"]:
        tuned, name = section["tuned"][index], section["split"] or "prompt_loose"
        label = f"{name.replace('_', ', ')}{', types ' + section['benchmark'] if section['benchmark'] else ''}"
        yield _row(label, section["rows"], _percent(section["base"]), _percent(tuned), _delta(tuned))


def _pair_table(results: Mapping[str, Any]) -> Iterator[str]:
    yield from _heading("Pairs", "pairs", "prompts", "pairs made", "dropped, by stage and reason")
    for name, pairs in results["pairs"].items():
        drops = ", ".join(f"{reason} {count}" for reason, count in pairs["drops"].items())
        counts = pairs["counts"]
        yield _row(name, counts["pairs"] + counts["dropped"], counts["pairs"], drops)


def _choices(results: Mapping[str, Any]) -> Iterator[str]:
    title = "Rate and epochs, chosen on validation prompts"
    yield from _heading(title, "cell", "rate, epochs: prompts followed loosely, %", "chosen")
    for name, choice in results["chosen"].items():
        tried = ", ".join(f"{c['rate']:g}, {c['epochs']}: {100 * c['validation']:.1f}" for c in choice["candidates"])
        yield _row(name, tried, f"{choice['rate']:g}, {choice['epochs']}")


def _lengths(results: Mapping[str, Any]) -> Iterator[str]:
    heads = ("model", "tokens an answer to IFEval", "log-ratio of chosen, nats", "of rejected", "chosen that fell, %")
    yield from _heading("Length, and what training moved on held-out pairs", *heads)
    for name, model in results["evaluations"]["ifeval"].items():
        tokens = [count for count in model["tokens"] if count is not None]
        moved = results["moved"].get(name, {})
        ratios = [f"{moved[key]:+.1f}" if key in moved else "" for key in ("logratios/chosen", "logratios/rejected")]
        falls = f"{100 * moved['chosen_falls']:.0f}" if "chosen_falls" in moved else ""
        yield _row(name, f"{sum(tokens) / len(tokens):.0f}" if tokens else "", *ratios, falls)


def _costs(results: Mapping[str, Any]) -> Iterator[str]:
    yield from _heading("Time and memory", "step", "minutes", "CPU minutes", "peak memory, MiB")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for step in results["steps"]:  # the answers of a cell's candidates are one row
        name, candidate, _ = step["step"].partition("/")
        groups.setdefault(f"{name}, validation" if candidate else name, []).append(step)
    for name, steps in groups.items():
        minutes, cpu_minutes = (f"{sum(step[key] for step in steps) / 60:.1f}" for key in ("seconds", "cpu_seconds"))
        yield _row(name, minutes, cpu_minutes, max(step["peak_mib"] for step in steps))
    total = sum(step["seconds"] for step in results["steps"])
    yield _row("all", f"{total / 60:.0f}", f"{sum(s['cpu_seconds'] for s in results['steps']) / 60:.0f}", "")


def _shown(results: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        f"### Five answers, every {len(results['evaluations']['ifeval']['base']['scores']) // ANSWERS}th prompt",
    )
    for answer in results["answers"]:
        yield from ("", "```text", f"PROMPT  {_clipped(answer['prompt'])}", "")
        for name in ("before", "after"):
            yield from (f"{name.upper()}  {_clipped(answer[name])}", *answer[f"{name}_held"].split("\n"), "")
        yield "```"


def _clipped(text: str) -> str:
    shown = text.replace("```", "'''").strip()
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]} ... ({len(shown)} characters)"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the results of docs/real_model.md.")
    parser.add_argument("--out", type=Path, help="the folder of a run; for --collect")
    parser.add_argument("--collect", action="store_true", help=f"read the folder, and write {COMMITTED}")
    parser.add_argument("--write", action="store_true", help=f"write the results into {PAGE}")
    args = parser.parse_args()
    if args.collect and args.out is None:
        parser.error("--collect needs --out, the folder of a run")
    out = args.out.resolve() if args.out else None
    os.chdir(ROOT)
    try:
        if args.collect:
            assert out is not None
            COMMITTED.parent.mkdir(exist_ok=True)
            write_json(COMMITTED, collect(out))
        if not COMMITTED.exists():
            raise UserError(f"{COMMITTED} is missing; make it with --out FOLDER --collect")
        text = page(read_json(COMMITTED))
    except UserError as error:
        raise SystemExit(f"real: {error}") from None
    print(text)
    if args.write:
        head, _, _ = PAGE.read_text("utf-8").partition(HEADING)
        write_atomically(PAGE, f"{head}{HEADING}\n{text}")


if __name__ == "__main__":
    main()
