"""Measure what the certificates of docs/properties.md promise, on tables, on made-up sides and on biased labels.

    python -m recipes.experiments.neighbours.conformal                # run what is missing: about 3 CPU minutes
    python -m recipes.experiments.neighbours.conformal_page --write   # docs/properties.md, from the results alone

tables   four data sets of scikit-learn, three shapes, 20 splits: each trains a model as it is and one with the shape as
         a constraint, calibrates a band, and measures risk and error of both and of the adjusted model
sides    bands with two sides, over 400 draws of made-up sides: the risk of our cuts, and of the best point of a grid
biased   random-feature models on labels of which a share is biased: their distance from rising functions, and its bound

Each result is one line of RESULTS, with a hash of the code that made it. A stopped run resumes with what is missing.
All draws are by seed. Models and sizes were chosen on splits 100 and 101, which do not count.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from apo.guarantees import conformal, shapes
from apo.guarantees.conformal import Band, band
from apo.guarantees.shapes import Score, Shape, ShapeTester, constraints, move, nearest
from clair.core.files import content_hash
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.workers import ENVIRONMENT, completed, make_pool
from recipes.world.running import ending_in_one_line

RESULTS = Path("recipes/experiments/neighbours/results/conformal.jsonl")
ALPHAS = (0.1, 0.05, 0.01)
Line = dict[str, Any]
Floats = NDArray[np.float64]

# ---- tables

SPLITS = 20
SHAPES: tuple[Shape, ...] = get_args(Shape)
SIZES = {"diabetes": (200, 140), "breast cancer": (200, 200), "wine": (60, 99), "digits": (500, 600)}
"""Rows to train and to calibrate; the others measure. 99 is the fewest that can certify alpha 0.01."""


def table(name: str) -> tuple[Floats, Floats, int]:
    """Features, target, and the column along which the prediction should rise, or be concave.

    diabetes        the course of the disease after a year, along the body-mass index
    breast cancer   the radius of a tumor's worst cells, along the mean area; a radius is a root of an area
    wine            OD280/OD315, which measures phenols, along the flavanoids
    digits          how many of the 64 pixels of an image have ink, along the ink of one of 16 blocks of 2 x 2
    """
    from sklearn import datasets

    if name == "diabetes":
        features, target = datasets.load_diabetes(return_X_y=True, scaled=False)
        return features, target, 2
    if name == "digits":
        images = datasets.load_digits().images
        return images.reshape(-1, 4, 2, 4, 2).sum((2, 4)).reshape(-1, 16), (images > 0).sum((1, 2)).astype(float), 5
    data = datasets.load_wine() if name == "wine" else datasets.load_breast_cancer()
    names = [str(column) for column in data.feature_names]
    if name == "wine":
        target, coordinate = "od280/od315_of_diluted_wines", "flavanoids"
        columns = [column for column in names if column != target]
    else:
        target, coordinate = "worst radius", "mean area"
        columns = [column for column in names[:10] if column not in ("mean radius", "mean perimeter")]
    rows = data.data[:, [names.index(column) for column in columns]]
    return rows, data.data[:, names.index(target)], columns.index(coordinate)


def boosted(features: Floats, target: Floats, signs: list[int] | None = None) -> Score:
    """Gradient boosting, with one sign per feature if the prediction must rise in it."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    model = HistGradientBoostingRegressor(max_iter=60, min_samples_leaf=5, monotonic_cst=signs, random_state=0)
    return model.fit(features, target).predict


def concave_model(features: Floats, target: Floats, coordinate: int, pivots: Floats, *, rising: bool) -> Score:
    """A concave line along one coordinate, fitted first, plus gradient boosting of the residuals on the others.

    The line is a sum of hinges min(x, pivot) with weights >= 0, and of a slope, which is >= 0 if it must rise.
    """
    from sklearn.linear_model import LinearRegression

    def hinges(points: Floats) -> Floats:
        columns = np.minimum(points[:, [coordinate]], pivots[1:])
        return columns if rising else np.hstack([columns, -points[:, [coordinate]]])

    line = LinearRegression(positive=True).fit(hinges(features), target)
    rest = boosted(np.delete(features, coordinate, axis=1), target - line.predict(hinges(features)))
    return lambda points: line.predict(hinges(points)) + rest(np.delete(points, coordinate, axis=1))


def measure_table(name: str, split: int) -> Line:
    """One split of one data set: by shape, the three models' risk and squared error, and the band for each alpha."""
    features, target, coordinate = table(name)
    order = np.random.default_rng(split).permutation(len(target))
    train, calibrate, test = np.split(order, np.cumsum(SIZES[name]))
    # The pivots come from the training rows: they must not depend on the units.
    pivots = np.unique(np.quantile(features[train, coordinate], np.linspace(0, 1, 33)))
    rows, labels = features[train], target[train]
    free, signs = boosted(rows, labels), [int(column == coordinate) for column in range(features.shape[1])]
    predicted = free(features[test])

    def risk(up: Floats, down: Floats, within: Band) -> float:
        return float(((up > within.above) | (down > within.below)).mean())

    def error(predicted: Floats) -> float:
        return float(((predicted - target[test]) ** 2).mean())

    shapes: dict[str, Any] = {}
    for shape in SHAPES:
        tester = ShapeTester(coordinate, pivots, shape)
        if shape == "rises":
            constrained = boosted(rows, labels, signs)
        else:
            constrained = concave_model(rows, labels, coordinate, pivots, rising="rises" in shape)
        up, down = tester.sides(free, features[np.concatenate([calibrate, test])])
        (calibration_up, up), (calibration_down, down) = (np.split(side, [len(calibrate)]) for side in (up, down))
        adjusted = {}
        for alpha in ALPHAS:
            within = band(calibration_up, calibration_down, alpha)
            moved = move(predicted, up, down, within)
            sides = {"above": within.above, "below": within.below}
            adjusted[str(alpha)] = {**sides, "risk": risk(up, down, within), "error": error(moved)}
        shapes[shape] = {
            "risk": {
                "unconstrained": risk(up, down, Band(0.0, 0.0)),
                "constrained": risk(*tester.sides(constrained, features[test]), Band(0.0, 0.0)),
            },
            "error": {"unconstrained": error(predicted), "constrained": error(constrained(features[test]))},
            "adjusted": adjusted,
        }
    return {"shapes": shapes}


# ---- two sides

DRAWS, UNITS = 400, (50, 100, 500)
WORLDS: dict[str, tuple[Callable[[Floats, Floats], tuple[Floats, Floats]], Callable[[float, float], float]]] = {
    "alike": (lambda a, b: (a, b), lambda above, below: either(above, below)),
    "unequal": (lambda a, b: (5 * a, b / 2), lambda above, below: either(above / 5, 2 * below)),
    "equal": (lambda a, b: (a, a), lambda above, below: math.exp(-min(above, below))),
    "one side": (lambda a, b: (a, 0 * b), lambda above, _: math.exp(-above)),
    "heavy": (lambda a, b: (np.exp(2 * a), b), lambda above, below: either(math.log(max(above, 1)) / 2, below)),
}
"""The sides of a unit, from two independent exponential draws, and the exact risk of a band."""


def either(a: float, b: float) -> float:
    """The probability that one of two independent exponential draws exceeds its bound."""
    return 1 - (1 - math.exp(-a)) * (1 - math.exp(-b))


def best_on_the_data(up: Floats, down: Floats, alpha: float) -> Band:
    """The narrowest band that loses as few calibration units as CRC allows. It has no guarantee: it is for contrast."""
    allowed = math.floor(alpha * (len(up) + 1) - 1 + 1e-9)
    bounds = {x: float(np.sort(np.where(up > x, math.inf, down))[::-1][allowed]) for x in np.append(up, 0.0)}
    above = min(bounds, key=lambda x: x + bounds[x])
    return Band(float(above), bounds[above])


def measure_sides(world: str, n: int) -> Line:
    """The true risks and the mean widths of both ways to calibrate a band at alpha 0.1, over draws of n units."""
    sides, risk = WORLDS[world]
    rng, bands = np.random.default_rng(0), {"cuts": band, "best": best_on_the_data}
    risks: dict[str, list[float]] = {name: [] for name in bands}
    widths: dict[str, list[float]] = {name: [] for name in bands}
    for _ in range(DRAWS):
        up, down = sides(*rng.exponential(1.0, (2, n)))
        for name, calibrate in bands.items():
            within = calibrate(up, down, 0.1)
            risks[name].append(round(risk(within.above, within.below), 5))
            widths[name].append(within.width)
    return {"risks": risks, "width": {name: float(np.mean(values)) for name, values in widths.items()}}


# ---- biased labels

SHARES, ROWS, FEATURES, SEEDS = (0.0, 0.05, 0.2), (100, 1000, 10_000, 100_000), (20, 100, 500), 10
STRENGTH, NOISE = 2.0, 0.1
GRID = (np.arange(64) + 0.5) / 64
OTHERS = (np.arange(8) + 0.5) / 8


def truth(points: Floats) -> Floats:
    """min(x, 1/2) + z / 5 for points (x, z) of the unit square: it rises with x."""
    return np.minimum(points[:, 0], 0.5) + points[:, 1] / 5


def bias(points: Floats) -> Floats:
    """What a biased label has too little: 2 (x - 1/2), for x above 1/2."""
    return STRENGTH * np.maximum(points[:, 0] - 0.5, 0)


def distance_of_mean(share: float) -> float:
    """The distance in L2 of the labels' mean, truth - share x bias, from the functions that rise with x.

    With s = 2 share, the nearest rising function is constant from a = 1 - sqrt(1 + s) / 2 on; integrate the square.
    """
    s = STRENGTH * share
    gap = math.sqrt(1 + s) / 2 - 0.5
    return math.sqrt(gap**3 / 3 + (gap**3 - (gap - s / 2) ** 3) / (3 * s)) if s else 0.0


def random_features(points: Floats, weights: Floats) -> Floats:
    """max(0, w . (x, z, 1)) for each row w of the weights."""
    return np.maximum(np.hstack([points, np.ones((len(points), 1))]) @ weights.T, 0)


def trained_on_biased(share: float, rows: int, features: int, seed: int) -> Score:
    """A ridge regression on random features, of rows of which a `share` have biased labels."""
    rng = np.random.default_rng([seed, rows, features])
    points = rng.random((rows, 2))
    labels = truth(points) - (rng.random(rows) < share) * bias(points) + NOISE * rng.standard_normal(rows)
    weights = rng.standard_normal((features, 3))
    matrix = random_features(points, weights)
    gram = matrix.T @ matrix + 1e-3 * np.sqrt(rows) * np.eye(features)
    solution = np.linalg.solve(gram, matrix.T @ labels)
    return lambda x: random_features(x, weights) @ solution


def measure_biased(share: float, rows: int, features: int, seed: int) -> Line:
    """Distances in root mean square on a grid of 64 x 8 points, and a band at alpha 0.05 from 200 unlabelled units.

    The functions that rise are a convex cone. So for any f its distance from them is at least <f, u>, where u is the
    unit vector from the nearest rising function to the labels' mean.
    """
    score = trained_on_biased(share, rows, features, seed)
    points = np.stack([np.tile(GRID, 8), np.repeat(OTHERS, 64)], axis=1)
    values, true = score(points), truth(points)
    mean = true - share * bias(points)
    matrix = constraints(GRID, "rises")

    def distance(a: Floats, b: Floats) -> float:
        return float(np.sqrt(((a - b) ** 2).mean()))

    def risen(line: Floats) -> Floats:
        return np.concatenate([nearest(part, matrix) for part in line.reshape(8, 64)])

    away = mean - risen(mean)
    length = float(np.sqrt((away**2).mean()))
    tester = ShapeTester(0, np.linspace(0, 1, 33))
    units = np.random.default_rng(1000 + seed).random((400, 2))
    up, down = tester.sides(score, units)
    within = band(up[:200], down[:200], 0.05)
    adjusted = tester.adjusted(score, within)
    return {
        "distance": distance(values, risen(values)),
        "error": distance(values, mean),
        "distance of mean": length,
        "bound": max(0.0, float((values * away).mean()) / length) if length > 1e-9 else 0.0,
        "width": within.width,
        "risk": float(((up[200:] > 0) | (down[200:] > 0)).mean()),
        "risk adjusted": float(((up[200:] > within.above) | (down[200:] > within.below)).mean()),
        "from truth": distance(values, true),
        "adjusted from truth": distance(adjusted(points), true),
    }


# ---- all


def jobs() -> Iterator[tuple[tuple[Any, ...], Callable[..., Line]]]:
    """The key of each result, and the function that measures it from the key's parts."""
    for split in range(SPLITS):
        for name in SIZES:
            yield ("table", name, split), measure_table
    for world in WORLDS:
        for n in UNITS:
            yield ("sides", world, n), measure_sides
    for share in SHARES:
        for seed in range(SEEDS):
            sizes = [(rows, FEATURES[1]) for rows in ROWS] + [(ROWS[2], features) for features in FEATURES[::2]]
            for rows, features in sizes:
                yield ("biased", share, rows, features, seed), measure_biased


def measure(key: tuple[Any, ...]) -> Line:
    """The result with this key, with its processor seconds."""
    started, function = time.process_time(), dict(jobs())[key]
    return {"key": key, **function(*key[1:]), "cpu_seconds": round(time.process_time() - started, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the certificates promise.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    args = parser.parse_args()
    os.environ |= ENVIRONMENT
    code = content_hash([inspect.getsource(module) for module in (conformal, shapes, sys.modules[__name__])])[:16]
    with ending_in_one_line("conformal"), make_pool(args.workers) as pool:
        finished = {tuple(line["key"]) for line in results.read(RESULTS)}
        missing = {str(key): (key,) for key, _ in jobs() if key not in finished}
        for name, line in completed(pool, measure, missing):
            results.append(RESULTS, {**line, "code": code})
            print(name, flush=True)


if __name__ == "__main__":
    main()
