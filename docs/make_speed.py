"""Write the table of training speed in README.md and docs/measurements.md from the raw results of train_vs_trl.

python docs/make_speed.py             # writes
python docs/make_speed.py --check     # fails if a page differs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measurements.md")
MARK = "<!-- speed -->\n"
ROWS = {
    ("train_vs_trl_real_amd", "real model"): "SmolLM2-135M in full, IFEval prompts, 8 a batch; AMD processor 1",
    ("train_vs_trl_real_intel", "real model"): "the same on an Intel processor",
    ("train_vs_trl_real", "real model"): "the same on AMD processor 2, as all below",
    ("train_vs_trl", "clair 4"): "CLAIR lengths, 4 a batch",
    ("train_vs_trl", "clair 8"): "CLAIR lengths, 8 a batch",
    ("train_vs_trl", "prompt 1200, responses 300"): "prompts of 1,200 tokens, answers of 300, 4 a batch",
}
"""File of results and case in it, in the order of the table: the real model comes first."""
COLUMNS = {"ours": "here", "trl defaults": "TRL's defaults", "trl best": "TRL's fastest settings"}


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Label and results of each row of the table."""
    files = {name: json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name, _ in ROWS}
    return [(label, files[name]["cases"][case]) for (name, case), label in ROWS.items()]


def cell(case: dict[str, Any], mode: str) -> str:
    """The best time of a mode, and by how many times it is slower: the least and the most of all repeats."""
    if mode in case["seconds"]:
        ratio = f" ({span(case['ratio'][mode])})" if mode in case["ratio"] else ""
        return f"{min(case['seconds'][mode]):.1f} s{ratio}"
    step = case.get("step_ratio", {}).get(mode)
    return f"killed above {case['memory_limit_gb']:g} GB" + (f"; a step: {span(step)}" if step else "")


def span(ratio: dict[str, float]) -> str:
    """The least and the most of a ratio."""
    return f"{ratio['min']:.1f}-{ratio['max']:.1f}x"


def table(measured: list[tuple[str, dict[str, Any]]]) -> str:
    """The table of all measured cases, in markdown."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {label} | {' | '.join(cell(case, mode) for mode in COLUMNS)} |" for label, case in measured]
    peaks = [
        ", ".join(f"{peak:,.0f}" if (peak := case["peak_mb"].get(mode)) else "–" for _, case in measured)
        for mode in COLUMNS
    ]
    return "\n".join([*lines, f"| peak memory of each, MB | {' | '.join(peaks)} |"]) + "\n"


def with_table(text: str, written: str) -> str:
    """A page with its table, after the mark, replaced."""
    before, _, after = text.partition(MARK)
    old, blank, rest = after.partition("\n\n")
    return f"{before}{MARK}{written}{blank[1:]}{rest}" if old else text


def main() -> None:
    """Write the pages, or compare them with the results."""
    for page in PAGES:
        text = page.read_text("utf-8")
        new = with_table(text, table(cases()))
        if "--check" in sys.argv and new != text:
            sys.exit(f"{page.name} is not what the results say; run python docs/make_speed.py")
        page.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
