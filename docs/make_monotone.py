"""Print the tabular example of docs/neighbours.md: a regressor made to rise in one feature, without training it again.

python docs/make_monotone.py [SPLITS]

The diabetes data of scikit-learn, 442 patients: the course of the disease after a year should not fall as the body-mass
index rises. Each split trains on 200 patients, calibrates on 140 and measures on 102. Three models: gradient boosting
as it is (`unconstrained`), the same inside its certified band (`adjusted`), and one trained to rise (`constrained`).
"""

from __future__ import annotations

import sys

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.ensemble import HistGradientBoostingRegressor

from apo.guarantees.properties import SearchTester, adjusted

BMI = 2
TRAIN, CALIBRATE = 200, 140
ALPHAS = (0.1, 0.05, 0.01)


def measure(splits: int) -> dict[float, dict[str, float]]:
    """Per alpha the means over splits: sides of the band, risk (units the tester rejects) and mean squared error."""
    features, target = load_diabetes(return_X_y=True, scaled=False)
    rows: dict[float, list[dict[str, float]]] = {alpha: [] for alpha in ALPHAS}
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(target))
        train, calibrate, test = np.split(order, [TRAIN, TRAIN + CALIBRATE])
        free, held = (
            HistGradientBoostingRegressor(max_iter=60, monotonic_cst=signs, random_state=0).fit(
                features[train], target[train]
            )
            for signs in (None, [int(column == BMI) for column in range(10)])
        )
        # Pivots and lines come from the training rows: they must not depend on the units.
        pivots = np.unique(np.quantile(features[train, BMI], np.linspace(0, 1, 33)))
        tester = SearchTester(BMI, pivots)
        for alpha in ALPHAS:
            band = tester.certify(free.predict, features[calibrate], alpha, seed=split).band
            moved = adjusted(free.predict, BMI, pivots, band)

            def error(model, rows=test):
                return float(((model(features[rows]) - target[rows]) ** 2).mean())

            def risk(model, within, rows=test, tester=tester):
                up, down = tester.sides(model, features[rows])
                return float(((up > within[0]) | (down > within[1])).mean())

            rows[alpha].append(
                {
                    "above": band.above,
                    "below": band.below,
                    "risk, unconstrained": risk(free.predict, (1e-9, 1e-9)),
                    "risk, adjusted": risk(free.predict, (band.above, band.below)),
                    "risk, constrained": risk(held.predict, (1e-9, 1e-9)),
                    "MSE, unconstrained": error(free.predict),
                    "MSE, adjusted": error(moved),
                    "MSE, constrained": error(held.predict),
                }
            )
    return {alpha: {key: float(np.mean([row[key] for row in group])) for key in group[0]}
            for alpha, group in rows.items()}  # fmt: skip


def table(measured: dict[float, dict[str, float]]) -> str:
    """The measurements as Markdown."""
    keys = list(next(iter(measured.values())))
    lines = [f"| alpha | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for alpha, row in measured.items():
        cells = (f"{value:.3f}" if key.startswith("risk") else f"{value:.0f}" for key, value in row.items())
        lines.append(f"| {alpha} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 40)))
