"""PAL on personas with a real encoder: how many comparisons locate a user whom the fit has not seen?

    python -m recipes.experiments.neighbours.pal --out runs/pal        # 20 CPU minutes; goes on where it was stopped
    python -m recipes.experiments.neighbours.pal --write               # the tables and the picture of docs/pal.md

For two and for three personas (personas.py), the statements are embedded once (encoder.py) and stored as a file of
features. `apo reward curve` then measures 20 splits of 18 users. For three personas it does so for one to four
prototypes as well, and for each distance and loss, with fewer splits. results/pal.json has the summaries and the
settings.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from clair.core.files import read_json, write_atomically, write_json
from recipes.experiments.neighbours import encoder
from recipes.experiments.neighbours.personas import comparisons
from recipes.experiments.tastes.run import REWARDS, apo, settings
from recipes.world.running import ending_in_one_line

RESULTS = Path(__file__).parent / "results" / "pal.json"
USERS, SEED = 18, 0
CURVES: dict[str, dict[str, Any]] = {
    "2 personas": {"personas": 2, "prototypes": 2},
    "3 personas": {"personas": 3, "prototypes": 3},
    **{f"3 personas, K = {k}": {"personas": 3, "prototypes": k, "splits": 4, "shots": [20]} for k in (1, 2, 4)},
    **{
        f"3 personas, {distance}, {loss}": {
            **{"personas": 3, "prototypes": 3, "splits": 4, "shots": [5, 20]},
            **{"distance": distance, "loss": loss},
        }
        for distance, loss in (("norm", "logistic"), ("squared", "hinge"), ("norm", "hinge"))
    },
}
"""The settings of each curve; `personas` names the data set, all others are keys of `apo reward curve`."""


def write_data(folder: Path, personas: int, model: Path) -> None:
    """Write the comparisons of both splits and their features, unless they are there."""
    if (folder / "features.npz").exists():
        return
    rows = comparisons(personas, USERS, SEED)
    for split, split_rows in rows.items():
        write_atomically(folder / "data" / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in split_rows))
    pairs = [row for split_rows in rows.values() for row in split_rows]
    texts = sorted({row[side] for row in pairs for side in ("chosen", "rejected")})
    vectors = dict(zip(texts, encoder.embed(model, texts), strict=True))
    sides = {side: np.stack([vectors[row[side]] for row in pairs]) for side in ("chosen", "rejected")}
    temporary = folder / ".features.npz"
    np.savez(temporary, id=[row["id"] for row in pairs], encoder=model.name, **sides)
    temporary.rename(folder / "features.npz")


def measure(out: Path, model: Path) -> None:
    """Measure every curve that is not finished, and store all of them in `RESULTS`."""
    curves, seconds = {}, time.process_time()
    for name, values in CURVES.items():
        personas, *options = values.items()
        data = out / f"{personas[1]}-personas"
        write_data(data, personas[1], model)
        folder = out / "curves" / name.replace(" ", "-").replace(",", "").replace("=-", "")
        if not (folder / "curve.json").exists():
            print(name, flush=True)
            keys = settings(dataset=data / "data", features=data / "features.npz", model="null", **dict(options))
            apo("reward", "curve", REWARDS / "curve.yaml", *keys, "--out", folder)
        curves[name] = {"settings": values, **read_json(folder / "curve.json")}
    write_json(RESULTS, {"encoder": model.name, "users": USERS, "seed": SEED, "curves": curves})
    print(f"wrote {RESULTS} ({time.process_time() - seconds:.0f} CPU seconds)")


def main() -> None:
    parser = argparse.ArgumentParser(description="PAL on personas: the curve of unseen users.")
    parser.add_argument("--out", type=Path, default=Path("runs/pal"))
    parser.add_argument("--encoder", type=Path, help="the folder of an encoder; all-MiniLM-L6-v2 without it")
    arguments = parser.parse_args()
    with ending_in_one_line("pal"):
        measure(arguments.out, arguments.encoder or encoder.default_folder())


if __name__ == "__main__":
    main()
