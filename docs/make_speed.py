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
    "real model": "SmolLM2-135M in full, IFEval prompts, 8 a batch", "clair 4": "CLAIR lengths, 4 a batch",
    "clair 8": "CLAIR lengths, 8 a batch",
    "prompt 1200, responses 300": "prompts of 1,200 tokens, answers of 300, 4 a batch",
}  # fmt: skip
"""Cases of the benchmark in the order of the table: the real model comes first."""
COLUMNS = {"ours": "here", "trl defaults": "TRL's defaults", "trl best": "TRL's fastest settings"}


def cases() -> dict[str, dict[str, Any]]:
    """The measured cases, of all result files of the benchmark."""
    files = [json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("train_vs_trl*.json"))]
    return {name: case for result in files for name, case in result["cases"].items()}


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


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The table of all measured cases, in markdown."""
    names = [name for name in ROWS if name in measured]
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {ROWS[name]} | {' | '.join(cell(measured[name], mode) for mode in COLUMNS)} |" for name in names]
    peaks = [
        ", ".join(f"{peak:,.0f}" if (peak := measured[name]["peak_mb"].get(mode)) else "–" for name in names)
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
