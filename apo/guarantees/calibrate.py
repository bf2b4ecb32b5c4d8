"""Calibrate a filter from scored pairs and an audit (`apo calibrate`), and certify a score (`apo certify`).

The pairs have the columns `SCORES`. The audit, by a person or a better judge, states for some ids if the pair is bad.
The unit of every guarantee is the prompt: if a prompt has several rows, one is drawn by hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apo.data.pair_rows import pair_id, read_pair_rows
from apo.guarantees.conformal import (
    candidate_thresholds,
    crc_threshold,
    joint_promise,
    precision_promise,
    precision_threshold,
)
from apo.guarantees.properties import Certificate, PropertyKind, certify_widths, critical_widths
from clair.core.errors import UserError, list_some, near_miss
from clair.core.files import content_hash, read_json
from clair.data.records import SCORES
from clair.data.row_files import read_jsonl
from clair.storage.location import Location

Guarantee = Literal["joint", "precision"]
_MAX_NAMES = 3


@dataclass(frozen=True)
class Filter:
    """A filter that keeps a pair only if its gap is above `above`, with its guarantee and the ids by decision."""

    above: float
    promise: str
    accepted: tuple[str, ...]
    dropped: tuple[str, ...]

    @classmethod
    def from_decisions(cls, above: float, promise: str, decisions: Mapping[str, bool]) -> Filter:
        """Return the filter with these decisions by id, True to keep a pair."""
        accepted, dropped = (
            tuple(id for id, keep in decisions.items() if keep is decision) for decision in (True, False)
        )
        return cls(above, promise, accepted, dropped)

    def recipe(self) -> str:
        """Return the filter as part of a clair recipe; empty if it keeps all pairs."""
        return "" if self.above == -math.inf else f"filters:\n  gap: {{above: {self.above!r}}}\n"

    def decisions(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of a decisions file for `clair keep`, about the dataset with this manifest."""
        from clair.reporting.review import FORMAT, fingerprint

        marks = {**dict.fromkeys(self.accepted, "keep"), **dict.fromkeys(self.dropped, "drop")}
        return {"format": FORMAT, "dataset": fingerprint(manifest), "decisions": marks}


def calibrate(
    pairs: Sequence[Mapping[str, Any]],
    audit: Sequence[Mapping[str, Any]],
    alpha: float,
    guarantee: Guarantee = "joint",
    *,
    delta: float = 0.1,
    trained_on: Iterable[str] = (),
) -> Filter:
    """Return the filter on the score gap with the requested guarantee.

    joint       P(a new pair is kept and bad) <= alpha, on average over draws of the audit
    precision   P(share of bad pairs among the kept > alpha) <= delta

    `pairs` have id, prompt and scores. Rows of `audit` have id and bad (true or false), and scores if they are not
    among the pairs. Raises UserError if no threshold exists, and if the audit has pairs that the judge was trained on
    (`trained_on`, ids): their scores are too good, and the guarantee would not hold.
    """
    import numpy as np

    by_id = {row["id"]: row for row in pairs}
    check_no_overlap([by_id.get(row["id"], row) for row in audit], trained_on)
    units = one_row_per_prompt([{**by_id.get(row["id"], {}), **row} for row in audit])
    bad, gap = np.array([_is_bad(row) for row in units]), np.array([_gap(row) for row in units])
    audited = {row["id"] for row in audit}
    if guarantee == "joint":
        above = crc_threshold(np.where(bad, gap, -math.inf), alpha, lowest=-math.inf)
        promise = joint_promise(above, alpha, len(units))
    else:
        unaudited = [_gap(row) for row in pairs if row["id"] not in audited]
        if not unaudited:
            raise UserError("every pair is in the audit; precision takes its thresholds from the scores of other pairs")
        candidates = candidate_thresholds(np.array(unaudited), len(units), alpha, delta)
        above = precision_threshold(gap, bad, alpha, delta, candidates)
        promise = precision_promise(above, alpha, delta, len(units))
    if above == math.inf:
        raise UserError(promise)
    return filter_above(pairs, above, promise)


def filter_above(pairs: Sequence[Mapping[str, Any]], above: float, promise: str) -> Filter:
    """Return the filter that keeps the pairs whose gap is strictly above `above`."""
    return Filter.from_decisions(above, promise, {row["id"]: _gap(row) > above for row in pairs})


def certify(
    rows: Sequence[Mapping[str, Any]],
    alpha: float,
    kind: PropertyKind = "rises",
    *,
    of: str = SCORES[0],
    than: str = SCORES[1],
    ladder: Sequence[str] = (),
    bound: float = 0.0,
    distance: str = "",
    trained_on: Iterable[str] = (),
) -> Certificate:
    """Return the certificate that score columns have a property up to a band, with one row per prompt.

    rises       `of` is never below `than`: a revision never scores lower than the answer that it revises; or, with the
                columns of a `ladder`, no column is below an earlier one
    same        these columns are equal: length padding does not change the score
    concave     the columns of a `ladder`, at equal steps, gain less and less
    floor       `of` is at least `bound`
    ceiling     `of` is at most `bound`
    lipschitz   `of` and `than` differ by at most `bound` times the column `distance`

    Raises UserError for a missing column, for rows that the scorer was trained on, and if there are too few prompts.
    """
    import numpy as np

    check_no_overlap(rows, trained_on)
    units = one_row_per_prompt(rows)
    columns = [of] if kind in ("floor", "ceiling") else [*ladder] or [than, of]
    scores = np.array([[number(row, column) for column in columns] for row in units])
    distances = np.array([number(row, distance) for row in units]) if distance else 1.0
    order = " to ".join(columns)
    descriptions = {
        "rises": f"no score falls from {order}" if ladder else f"{of} is never below {than}",
        "concave": f"scores gain less and less from {order}",
        "same": f"scores are equal from {order}" if ladder else f"{of} equals {than}",
        "floor": f"{of} is at least {bound:g}",
        "ceiling": f"{of} is at most {bound:g}",
        "lipschitz": f"{of} and {than} differ by at most {bound:g} times {distance}",
    }
    certificate = certify_widths(critical_widths(kind, scores, bound, distances), alpha, descriptions[kind])
    if certificate.refusal():
        raise UserError(certificate.refusal())
    return certificate


def undecided(rows: Sequence[Mapping[str, Any]], certificate: Certificate) -> tuple[Filter, int, int]:
    """Return the filter that keeps pairs whose gap is above the band of a certificate, and two numbers of other pairs.

    The first is of undecided pairs, whose gap lies within the band. The second is of pairs that are decided for the
    rejected answer, whose gap is below the band. Raises UserError if the filter leaves out all pairs: then the property
    is not certified in any useful sense.
    """
    result = filter_above(rows, certificate.band.width, certificate.description)
    if not result.accepted:
        raise UserError(
            f"{certificate.description}: it fails on {certificate.unadjusted.mean:.3g} of {certificate.n} prompts, and "
            f"the band of {certificate.band.width:.4g} leaves no pair decided; mend the score, or raise alpha above "
            f"{certificate.alpha:g}"
        )
    reversed_ = sum(_gap(row) < -certificate.band.width for row in rows)
    return result, len(result.dropped) - reversed_, reversed_


def one_row_per_prompt(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return one row per prompt, drawn by the hash of its id. A row without a prompt counts as a further prompt."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: content_hash(row["id"])):
        unit = content_hash(row["prompt"]) if row.get("prompt") else f"id {row['id']}"
        chosen.setdefault(unit, row)
    return list(chosen.values())


def check_no_overlap(rows: Sequence[Mapping[str, Any]], trained_on: Iterable[str]) -> None:
    """Raise UserError, with some ids, if rows are among those that the judge was trained on.

    A row that `apo reward score` with `by_group` derived from a pair counts as that pair; its column `pair` has the id.
    """
    trained = set(trained_on)
    ids = [pair_id(row) for row in rows]
    common = [id for id in dict.fromkeys(ids) if id in trained]
    if common:
        raise UserError(
            f"the judge was trained on {list_some(common, _MAX_NAMES)}: its scores of them are too good to calibrate "
            f"on; take these {len(common)} of {len(set(ids))} rows out, or audit others"
        )


def number(row: Mapping[str, Any], column: str) -> float:
    """Return the finite number in a column of a row, such as `score_chosen` or `contrast.levenshtein`.

    Raises UserError with row and column for any other value.
    """
    struct, _, field = column.partition(".")
    if column not in row and isinstance(row.get(struct), Mapping):
        row = {**row, column: row[struct].get(field)}
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        problem = (
            f"column {column!r} is {value!r}" if column in row else f"no column {column!r}{near_miss(column, row)}"
        )
        raise UserError(f"row {row['id']!r}: {problem}; it must be a finite number, such as `apo reward score` writes")
    return float(value)


def _gap(row: Mapping[str, Any]) -> float:
    return number(row, SCORES[0]) - number(row, SCORES[1])


def _is_bad(row: Mapping[str, Any]) -> bool:
    if not isinstance(row.get("bad"), bool):
        raise UserError(f"audit row {row['id']!r}: bad is {row.get('bad')!r}; it is true or false")
    return bool(row["bad"])


def read_audit(path: str | Path) -> list[dict[str, Any]]:
    """Read an audit file, JSONL with `id` and `bad`.

    Raises UserError for an invalid row, and for an id that is marked both good and bad.
    """
    rows = _jsonl(path, "audit")
    marks: dict[str, Any] = {}
    for row in rows:
        if marks.setdefault(row["id"], row.get("bad")) != row.get("bad"):
            raise UserError(f"audit {path}: {row['id']!r} is marked both good and bad; give one row for each id")
    if not rows:
        raise UserError(f"audit {path} is empty; give at least one row with id and bad")
    return list({row["id"]: row for row in rows}.values())


def read_ids(path: str | Path) -> list[str]:
    """Read the ids that a judge was trained on from a reward's folder, a dataset folder, or JSONL rows with `id`.

    Those of a reward include the comparisons of the users who were added to it.
    """
    folder = Path(path)
    if (folder / "reward.json").is_file():
        added = (read_json(file)["answers"] for file in sorted((folder / "users").glob("*.json")))
        return [*read_json(folder / "reward.json")["trained_on"], *(answer["id"] for row in added for answer in row)]
    rows = read_pair_rows(path) if folder.is_dir() or Location(path).is_url else _jsonl(path, "file of ids")
    return [pair_id(row) for row in rows]


def _jsonl(path: str | Path, name: str) -> list[dict[str, Any]]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{name} {file} does not exist; give a JSONL file whose rows have an id")
    rows = []
    for location, row in read_jsonl(file):
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
            raise UserError(f"{name} {location}: no id; each row has the id of its pair")
        rows.append({**row, "id": str(row["id"])})
    return rows
