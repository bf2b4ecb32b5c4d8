"""MixEval's questions: a data folder checked by SHA-256, and prompts that equal upstream's byte for byte.

The questions belong to their authors and are not part of this package: `apo eval fetch-mixeval` downloads them. All
hashes are of upstream commit 7c52b41. A folder has the layout

    VERSION/mixeval-hard/{free-form,multiple-choice}.json    and VERSION/mixeval/ for the full benchmark
    judge_prompts.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apo.evaluation.records.mixeval import SPLITS, Split
from clair.core.errors import UserError, check_name
from clair.core.files import content_hash

UPSTREAM = "Psycoy/MixEval"
COMMIT = "7c52b41929d461df7733573528bdfb08774b0c53"
JUDGE_PROMPTS = "judge_prompts.json"
CHECKSUMS = "checksums.json"
HardOrFull = Literal["hard", "full"]
FOLDERS: Mapping[HardOrFull, str] = {"hard": "mixeval-hard", "full": "mixeval"}

FILES_SHA256: Mapping[tuple[str, Split], str] = {
    ("2024-06-01", "free-form"): "55167abde842c86b80504913eaf839a2fbd7e96b4332eb69406f583dbb6ce7c5",
    ("2024-06-01", "multiple-choice"): "11e57fa2e1bc6bd3529167e4353991cae7c548e55ccf5067ef42a95971397af1",
    ("2024-08-11", "free-form"): "4784526892f825d421a43a3c34a139adcfa9f8b17d1898b7e5c57079fecf5b4e",
    ("2024-08-11", "multiple-choice"): "3015ee7cc02f20ae7e412e0b42919a9a7d361c6c37de36db5ada38a576a36fea",
}
"""SHA-256 of the Hard files."""
JUDGE_SHA256: Mapping[Split, str] = {
    "free-form": "64bc0973729b664e9bdf8461b87ef77ac52b225d9edbdee6046ae195f55a8d8a",
    "multiple-choice": "6c1a112b203f05b402ab258b4b8586162c2a4129c137c54fff33289209d0d2df",
}
"""SHA-256 of the judge's user message with the placeholders {P} (question), {G} (gold) and {R} (response)."""
VERSIONS = tuple(sorted({version for version, _ in FILES_SHA256}))

_EMPTY_CONTEXTS = ("", "none", "null")
_STEP_BY_STEP = ("BBH", "GSM8k", "MATH")
_ANSWER_STEP_BY_STEP = "Answer the question. \nLet's think step by step."
_ANSWER_SHORTLY = "Answer the question shortly."
_ANSWER_WITH_A_LETTER = "Answer with the option letter from the given choices directly."


def letter(number: int) -> str:
    """The letter of an option: A for 0."""
    return chr(ord("A") + number)


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """One row of the benchmark. `options` is empty for a free-form question; `target` is upstream's."""

    split: Split
    row: int
    benchmark: str
    context: str | None
    prompt: str
    options: tuple[str, ...]
    target: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The row's name in the ledger."""
        return f"{self.split}:{self.row}"

    @property
    def question(self) -> str:
        """16 hex digits of the hash of the question with its passage and options, equal for rows that repeat it."""
        return content_hash([self.split, self.context, self.prompt, self.options])[:16]

    @property
    def has_context(self) -> bool:
        """True if a passage precedes the question."""
        return self.context is not None and self.context.strip().lower() not in _EMPTY_CONTEXTS

    @property
    def passage(self) -> str | None:
        """16 hex digits of the hash of split and passage, which several questions may share; None without a passage."""
        return content_hash([self.split, self.context])[:16] if self.has_context else None

    @property
    def cluster(self) -> str:
        """The unit of independent sampling: the passage, or the question if it has none."""
        return self.passage or self.question

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the options."""
        return tuple(letter(n) for n in range(len(self.options)))

    @property
    def right(self) -> tuple[str, ...]:
        """The gold answers of a free-form question, or the right letter."""
        return tuple(letter(n) for n in self.target) if self.options else tuple(self.target)

    @property
    def lettered(self) -> str:
        """The options as lines `A. ...`."""
        return "\n".join(f"{letter(n)}. {option}" for n, option in enumerate(self.options))

    @property
    def text(self) -> str:
        """The user turn that the model is sent."""
        question = f"{self.context}\n{self.prompt}" if self.has_context else self.prompt
        if self.options:
            return f"{question}\n{self.lettered}\n{_ANSWER_WITH_A_LETTER}"
        instruction = _ANSWER_STEP_BY_STEP if self.benchmark in _STEP_BY_STEP else _ANSWER_SHORTLY
        return f"Question: {question}\n{instruction}"

    def as_upstream(self, index: str) -> dict[str, Any]:
        """The row in upstream's response format, without the response."""
        kind = {"problem_type": self.split, "context": self.context, "prompt": self.prompt}
        options = {"options": list(self.options)} if self.options else {}
        named = {"target": list(self.target), "benchmark_name": self.benchmark}
        return {**kind, **options, **named, "formated_input": self.text, "id": index}


@dataclass(frozen=True, slots=True)
class JudgePrompts:
    """The judge's messages for both splits; the user's has the placeholders {P}, {G} and {R}."""

    system: Mapping[Split, str]
    user: Mapping[Split, str]

    @property
    def sha256(self) -> str:
        """The hash of all four messages."""
        return content_hash([[self.system[split], self.user[split]] for split in SPLITS])

    def messages(self, row: BenchmarkRow, response: str) -> list[dict[str, str]]:
        """The request about a response. Only the template's placeholders are replaced, none in what is put in."""
        gold = row.lettered
        if not row.options:
            gold = "; ".join(f"<answer {n}> {answer}" for n, answer in enumerate(row.target, 1))
        values = {"{P}": row.prompt, "{G}": gold, "{R}": response}
        pieces = _split_at_placeholders(self.user[row.split])
        return [
            {"role": "system", "content": self.system[row.split]},
            {"role": "user", "content": "".join(values.get(piece, piece) for piece in pieces)},
        ]


def _split_at_placeholders(template: str) -> list[str]:
    """The template's text pieces and placeholders, in order."""
    pieces = [template]
    for name in ("{P}", "{G}", "{R}"):
        pieces = [piece for text in pieces for piece in _cut(text, name)]
    return pieces


def _cut(text: str, name: str) -> list[str]:
    head, match, tail = text.partition(name)
    return [head, name, tail] if match else [text]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The questions of one version, the first `limit` rows of each split, with the hashes of their files."""

    version: str
    split: HardOrFull
    rows: Mapping[Split, tuple[BenchmarkRow, ...]]
    sha256: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def all_rows(self) -> tuple[BenchmarkRow, ...]:
        """All rows, free-form first."""
        return tuple(row for split in SPLITS for row in self.rows[split])


def load(data: str | Path, version: str, split: HardOrFull = "hard", limit: int | None = None) -> Benchmark:
    """Read the benchmark in a data folder. Raises UserError if a file is missing, altered or of another version."""
    folder = Path(data)
    check_name("MixEval has no version", version, VERSIONS, "known")
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; get it with `apo eval fetch-mixeval {folder}`")
    rows: dict[Split, tuple[BenchmarkRow, ...]] = {}
    sha256, notes = {}, []
    for kind in SPLITS:
        name = f"{version}/{FOLDERS[split]}/{kind}.json"
        content = _read(folder, name)
        sha256[f"{kind}.json"] = hashlib.sha256(content).hexdigest()
        expected = FILES_SHA256[version, kind] if split == "hard" else _fetched(folder).get(name)
        if expected is None:
            notes.append(
                f"{folder / name} has no known hash to check it by; its own hash, {sha256[f'{kind}.json'][:16]}, "
                "is recorded"
            )
        elif expected != sha256[f"{kind}.json"]:
            raise UserError(
                f"{folder / name} is not the file of MixEval {version}: its sha256 is {sha256[f'{kind}.json']}, "
                f"expected {expected}; get it again with `apo eval fetch-mixeval {folder}`"
            )
        rows[kind] = _rows(content, kind, folder / name)[:limit]
    return Benchmark(version, split, rows, sha256, tuple(notes))


def load_judge_prompts(data: str | Path) -> JudgePrompts:
    """Read the judge's prompts in a data folder. Raises UserError if they are missing or altered."""
    file = Path(data) / JUDGE_PROMPTS
    try:
        stored = json.loads(_read(Path(data), JUDGE_PROMPTS))
        user: dict[Split, str] = {split: str(stored[split.replace("-", "_")]["user"]) for split in SPLITS}
        system: dict[Split, str] = {split: str(stored[split.replace("-", "_")]["system"]) for split in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} holds no judge messages ({error!r}); `apo eval fetch-mixeval {data}`") from error
    for split, text in user.items():
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if sha256 != JUDGE_SHA256[split]:
            raise UserError(
                f"{file}: the {split} judge message is not upstream's: its sha256 is {sha256}, expected "
                f"{JUDGE_SHA256[split]}; get it again with `apo eval fetch-mixeval {data}`"
            )
    return JudgePrompts(system, user)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{folder / name} is missing; get it with `apo eval fetch-mixeval {folder}`") from error


def _fetched(folder: Path) -> Mapping[str, str]:
    """The hashes that `fetch-mixeval` wrote beside the files it downloaded."""
    try:
        return dict(json.loads((folder / CHECKSUMS).read_text("utf-8"))["sha256"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CHECKSUMS} cannot be read ({error!r}); `apo eval fetch-mixeval {folder}`"
        ) from error


def _rows(content: bytes, split: Split, file: Path) -> tuple[BenchmarkRow, ...]:
    """Parse the rows of a file, in order. Raises UserError with the number of the first invalid row."""
    rows = []
    try:
        values = list(json.loads(content).values())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is no JSON object of rows ({error})") from error
    for number, value in enumerate(values):
        try:
            rows.append(_row(split, number, value))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}, row {number}: {error!r}; this is no row of MixEval") from error
    return tuple(rows)


def _row(split: Split, number: int, value: Mapping[str, Any]) -> BenchmarkRow:
    options = tuple(map(str, value["options"])) if split == "multiple-choice" else ()
    target = tuple(value["target"])
    if options and not (len(target) == 1 and isinstance(target[0], int) and 0 <= target[0] < len(options)):
        raise ValueError(f"target {target} is not the number of one of {len(options)} options")
    if not options and not all(isinstance(answer, str) for answer in target):
        raise ValueError("target holds something that is no text")
    context = value["context"]
    return BenchmarkRow(split, number, str(value["benchmark_name"]), context, str(value["prompt"]), options, target)
