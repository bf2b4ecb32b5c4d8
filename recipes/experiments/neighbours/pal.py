"""PAL on personas with a real encoder: how many comparisons locate a user whom the fit has not seen?

    python -m recipes.experiments.neighbours.pal --out runs/pal     # 3 CPU minutes; goes on where it was stopped
    python -m recipes.experiments.neighbours.pal --write            # the tables and the picture of docs/pal.md

The statements of three personas (personas.py) are embedded once (encoder.py) and stored as a file of features.
`apo reward curve` measures 20 splits of 18 users, and two splits for other numbers of prototypes. results/pal.json has
the settings, the summaries, and the accuracy of each user and split.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from apo.monitoring.result_plots import draw_curve
from clair.core.errors import UserError
from clair.core.files import read_json, write_atomically, write_json
from recipes.experiments.neighbours import encoder
from recipes.experiments.neighbours.personas import comparisons
from recipes.experiments.tastes.run import REWARDS, apo, settings
from recipes.world.running import ROOT, ending_in_one_line

RESULTS = Path(__file__).parent / "results" / "pal.json"
PAGE, PICTURE = ROOT / "docs" / "pal.md", ROOT / "docs" / "images" / "pal.png"
USERS, SEED = 18, 0
MAIN = "3-personas"
CURVES: dict[str, dict[str, Any]] = {
    MAIN: {"prototypes": 3},
    **{f"{MAIN}-K-{k}": {"prototypes": k, "splits": 2, "shots": [20]} for k in (1, 2, 4)},
}
"""The keys of `apo reward curve` for each curve, the main one first."""


def write_data(folder: Path, model: Path) -> None:
    """Write the comparisons of both splits and their features, unless they are there."""
    if (folder / "features.npz").exists():
        return
    rows = comparisons(USERS, SEED)
    for split, split_rows in rows.items():
        write_atomically(folder / "data" / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in split_rows))
    pairs = [row for split_rows in rows.values() for row in split_rows]
    texts = sorted({row[side] for row in pairs for side in ("chosen", "rejected")})
    vectors = dict(zip(texts, encoder.embed(model, texts), strict=True))
    sides = {side: np.stack([vectors[row[side]] for row in pairs]) for side in ("chosen", "rejected")}
    temporary = folder / ".features.npz"
    np.savez(temporary, id=[row["id"] for row in pairs], encoder=encoder.NAME, **sides)
    temporary.rename(folder / "features.npz")


def measure(out: Path, model: Path) -> None:
    """Measure every curve that is not finished, and store all of them in `RESULTS`."""
    data, curves = out / MAIN, {}
    write_data(data, model)
    for name, values in CURVES.items():
        folder = out / "curves" / name
        if not (folder / "curve.json").exists():
            print(name, flush=True)
            keys = settings(dataset=data / "data", features=data / "features.npz", model="null", **values)
            apo("reward", "curve", REWARDS / "curve.yaml", *keys, "--out", folder)
        files = sorted((folder / "splits").glob("*.json"), key=lambda file: int(file.stem))
        rows = [row for file in files for row in read_json(file)["rows"]]
        curves[name] = {"settings": values, "summary": read_json(folder / "curve.json"), "rows": rows}
    write_json(RESULTS, {"encoder": encoder.NAME, "users": USERS, "seed": SEED, "curves": curves})
    print(f"wrote {RESULTS}")


def curve_table(curves: dict[str, Any]) -> str:
    """The main curve as a table of the page."""
    names = ("adapted", "bradley_terry", "alone")
    lines = ["| comparisons of the user | PAL, K = 3 | Bradley-Terry | the user alone |", "|---|---|---|---|"]
    for point in curves[MAIN]["summary"]["points"]:
        cells = (_percent(point[name]) for name in names)
        lines.append(f"| {point['shots']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def options_table(curves: dict[str, Any]) -> str:
    """The accuracies after 20 comparisons with other numbers of prototypes."""
    lines = ["| options | splits | PAL | Bradley-Terry |", "|---|---|---|---|"]
    for curve in curves.values():
        values = {key: value for key, value in curve["settings"].items() if key not in ("splits", "shots")}
        options = ", ".join(f"`{key}: {value}`" for key, value in values.items())
        point = next(point for point in curve["summary"]["points"] if point["shots"] == 20)
        cells = _percent(point["adapted"]), _percent(point["bradley_terry"])
        lines.append(f"| {options} | {curve['summary']['splits']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(estimate: dict[str, float]) -> str:
    mean, low, high = (f"{100 * estimate[part]:.0f}" for part in ("mean", "lo", "hi"))
    return f"{mean} [{low}, {high}]"


def write_page() -> None:
    """Put both tables and the picture of the raw results into the page. Raises UserError without their marks."""
    curves, text = read_json(RESULTS)["curves"], PAGE.read_text("utf-8")
    for mark, table in (("curve", curve_table(curves)), ("options", options_table(curves))):
        text, count = re.subn(rf"(?<=<!-- pal {mark} -->\n)(?:\|.*\n)*", lambda _, table=table: f"{table}\n", text)
        if count != 1:
            raise UserError(f"{PAGE.name} has {count} marks <!-- pal {mark} -->; one is needed")
    write_atomically(PAGE, text)
    draw_curve(curves[MAIN]["summary"], PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description="PAL on personas: the curve of unseen users.")
    parser.add_argument("--out", type=Path, default=Path("runs/pal"))
    parser.add_argument("--encoder", type=Path, help="the folder of all-MiniLM-L6-v2; the extra's package without it")
    parser.add_argument("--write", action="store_true", help="write the tables and the picture of docs/pal.md")
    arguments = parser.parse_args()
    with ending_in_one_line("pal"):
        if arguments.write:
            write_page()
        else:
            measure(arguments.out, arguments.encoder or encoder.default_folder())


if __name__ == "__main__":
    main()
