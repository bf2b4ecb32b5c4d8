"""Run `apo compare`: read the result folders, compare them, and write compare.json and compare.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.evaluation.compare.compare import comparison
from apo.evaluation.compare.html import write_page
from apo.evaluation.compare.power import other_splits
from apo.evaluation.compare.rows import read_comparable
from clair.core.files import write_json

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, repr=False)
class ComparisonResult:
    """A comparison: the folder it is written to, the content of compare.json, and the page of changed answers."""

    out: Path
    content: Mapping[str, Any]
    page: Path

    def __repr__(self) -> str:
        overall = zip(self.content["tuned"], self.content["parts"][0]["tuned"], strict=True)
        deltas = ", ".join(f"{model['name']} {100 * numbers['delta']:+.1f}" for model, numbers in overall)
        return f"<{type(self).__name__} {self.out}: {deltas} points against {self.content['base']['name']}>"

    def table(self) -> Table:
        """Return the differences in points with intervals and p-values, as the command prints them."""
        from apo.evaluation.tables import comparison_table

        return comparison_table(self.content)

    def notes(self) -> list[str]:
        """Return notes on unresolved items, the bias of selecting the best model, and statistical power."""
        from apo.evaluation.tables import comparison_notes

        return list(comparison_notes(self.content))


def compare_folders(
    base: str | Path,
    tuned: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    difference: float = 0.02,
    data: str | Path | None = None,
) -> ComparisonResult:
    """Compare the result folders of tuned models with that of their base, and write compare.json and compare.html.

    `out` is the folder to write to; None: `compare` beside the base's folder. `difference` is the true difference, a
    share, whose power is computed. `data` is a folder of MixEval's data; the power table includes its other splits.
    Raises UserError as `read_comparable` and `other_splits` do.
    """
    results = read_comparable(base, tuned)
    split_sizes = other_splits(data, results[0].score.comparable()) if data else {}
    content = comparison(results, difference=difference, split_sizes=split_sizes)
    folder = Path(out) if out else Path(base).resolve().parent / "compare"
    write_json(folder / "compare.json", content)
    return ComparisonResult(folder, content, write_page(folder / "compare.html", results, content))
