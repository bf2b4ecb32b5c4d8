"""Where prompts come from: JSONL, JSON, CSV, Parquet, or anything `datasets.load_dataset` reads, row by row.

The whole source is read once before any work, so that a broken row is an error with its number and not a surprise
after an hour of spending; a million rows are never in memory.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from clair.core.errors import UserError, near_miss, one_line, words_of
from clair.core.files import content_hash
from clair.core.recipe import Recipe
from clair.data.deduplication import Benchmark, NearDuplicates, Repeats
from clair.data.records import LABELS, Message, Messages, Prompt, Tools, content_id, task_text
from clair.storage.object_store import public_path, read_here

Holds = Callable[[str], bool]
_ROLES = ("system", "user", "assistant", "tool", "developer")


class PromptSource(Recipe):
    """`prompts:` of a data recipe."""

    path: str
    """A .jsonl, .ndjson, .json, .csv, .tsv or .parquet file (text also as .gz) or a dataset that clair built, here or
    at a URL that fsspec reads (s3://...), a folder `datasets.load_dataset` reads, or a dataset name on the hub."""
    split: str = "train"
    """The split, where `path` is a folder or a name."""
    columns: Mapping[str, str] = {}
    """What the columns are called where not prompt, answer, id, answers, scores, tools, user, group, behaviour and
    source: {prompt: instruction}; and `stronger`, a stronger model's answers, read only where their column is named."""
    near_duplicates: float | None = Field(None, gt=0, le=1)
    """Leave out prompts that share at least this much of their 5-word runs with an earlier one. Off by default: it
    judges by words alone, and tasks made from a template differ in few."""
    not_in: str | None = None
    """A prompt file (a benchmark's questions); prompts that share 13 words in a row with it are left out."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a look through the whole source found."""

    rows: int
    held: int
    """Rows of the part that was asked about; all, where none was."""
    unique: int
    answered: int
    """Different prompts with a ready answer."""
    compared: int
    """Different prompts with several ready answers."""
    scored: int
    """Different prompts whose answers have scores."""
    preferred: int
    """Different prompts with a stronger model's ready answer."""
    sha256: str
    tools: bool = False
    """Whether any row has tools, or turns with more than role and content."""
    repeated: bytes = field(default=b"", repr=False)
    """A bit for each row, set where an earlier row is equal; empty without any."""

    def repeats(self, row: int) -> bool:
        """Whether a row, counted from 0, is equal to an earlier one."""
        return row >> 3 < len(self.repeated) and bool(self.repeated[row >> 3] >> (row & 7) & 1)


def scan(source: PromptSource, limit: int | None = None, holds: Holds = lambda _: True) -> Scan:
    """Read every row once. Raises UserError for the first that cannot be used, with its number.

    And where one id stands for two prompts. `holds`: whether a row of this id is in the part of them that is asked
    about.
    """
    with closing(Repeats()) as contents, closing(Repeats()) as ids:
        return _scanned(source, limit, holds, contents, ids)


def _scanned(source: PromptSource, limit: int | None, holds: Holds, contents: Repeats, ids: Repeats) -> Scan:
    import numpy as np

    digest, like, held, tools = _Digest(), _like(source), 0, False
    # 8 bytes of each hash: a clash among 10^6 has odds of 3 in 10^8.
    counts, row = [0] * 5, -1  # different prompts, and of these those with an answer, answers, scores, a stronger one
    for row, prompt in enumerate(read_prompts(source, limit)):
        content = digest.add(prompt)
        held += holds(prompt.id)
        tools |= not prompt.plain
        own = [like(prompt) is None, prompt.answer is not None, bool(prompt.answers), bool(prompt.scores)]
        own.append(prompt.stronger is not None)
        counted = [own[0] and one for one in own]
        counts = [count + one for count, one in zip(counts, counted, strict=True)]
        contents.add(int(content, 16), row << 5 | sum(one << bit for bit, one in enumerate(counted)))
        if prompt.id != content:
            ids.add(int(content_hash(prompt.id)[:16], 16), row)
    if row < 0:
        raise UserError(f"{source.path} has no rows; give at least one prompt")
    repeated = np.zeros(row // 8 + 1, dtype=np.uint8)
    for found in contents.found():
        counts = [count - int((found >> bit & 1).sum()) for bit, count in enumerate(counts)]
        np.bitwise_or.at(repeated, found >> 8, np.uint8(1) << (found >> 5 & 7).astype(np.uint8))
    clashes = ids.found(lambda rows: repeated[rows >> 3] >> (rows & 7).astype(np.uint8) & 1 == 0)
    if clash := min((int(rows.min()) for rows in clashes if len(rows)), default=None):
        told = next(islice(read_prompts(source, limit), clash, None)).id
        raise UserError(
            f"{public_path(source.path)}, row {clash + 1}: the id {told!r} stands for two different prompts"
        )
    return Scan(row + 1, held, *counts, digest.hexdigest(), tools, repeated.tobytes() if repeated.any() else b"")


class _Digest:
    """A hash over ids and contents of all prompts, in order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, prompt: Prompt) -> str:
        """One more prompt. Returns its `content_id`."""
        content = prompt.content_id
        labels = f"\0{content_hash(dict(prompt.labels))}" if prompt.labels else ""
        self._sha256.update(f"{prompt.id}\0{content}{labels}\n".encode())
        return content

    def hexdigest(self) -> str:
        """The hash of what came so far."""
        return self._sha256.hexdigest()


def each_prompt(
    source: PromptSource, limit: int | None = None, found: Scan | None = None
) -> Iterator[tuple[Prompt, str | None]]:
    """Every prompt, and why it is left out: `duplicate`, `near_duplicate`, `in_benchmark`, or None for those that stay.

    `found` is what `scan` returned, where the caller has looked already. Raises UserError as `scan` does, and at the
    end where the prompts are no longer those that were looked at.
    """
    found, like, digest = found or scan(source, limit), _like(source), _Digest()
    for row, prompt in enumerate(read_prompts(source, limit)):
        digest.add(prompt)
        yield prompt, "duplicate" if found.repeats(row) else like(prompt)
    if digest.hexdigest() != found.sha256:
        raise UserError(
            f"{public_path(source.path)} was changed during the run; what came of it is not written, every reply is "
            f"kept: run the same command again, and leave the file alone until it ends"
        )


def _like(source: PromptSource) -> Callable[[Prompt], str | None]:
    """Tells of one prompt after another what else it is like, equal ones apart: a benchmark's question, or one before.

    An equal one may be told to it or not: nothing is remembered of what is like another.
    """
    near = NearDuplicates(source.near_duplicates) if source.near_duplicates else None
    benchmark = _benchmark(source.not_in) if source.not_in else None

    def like(prompt: Prompt) -> str | None:
        text = task_text(prompt.messages) if near or benchmark else ""
        if benchmark and benchmark.asks(text):
            return "in_benchmark"
        return "near_duplicate" if near and near.seen(text) else None

    return like


def _benchmark(path: str) -> Benchmark:
    return Benchmark(task_text(prompt.messages) for prompt in read_prompts(PromptSource(path=path)))


def read_prompts(source: PromptSource, limit: int | None = None) -> Iterator[Prompt]:
    """The rows of the source as prompts, in order. Raises UserError with the row's number where one is unusable."""
    names = {name: name for name in ("prompt", "answer", "id", "answers", "scores", "tools", *LABELS)}
    for key in source.columns:
        if key not in (known := (*names, "stronger")):
            allowed = ", ".join(known)
            raise UserError(f"prompts.columns: unknown name {key!r}{near_miss(key, known)}; allowed: {allowed}")
    names |= source.columns
    for where, row in islice(_rows(source), limit):
        yield _prompt(row, names, where)


def _prompt(row: Any, names: Mapping[str, str], where: str) -> Prompt:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: {type(row).__name__}, not an object with a {names['prompt']!r} field")
    if names["prompt"] not in row:
        raise UserError(
            f"{where}: no column {names['prompt']!r}; columns found: {', '.join(map(str, row)) or 'none'}; name yours "
            f"under prompts.columns"
        )
    messages = _messages(row[names["prompt"]], where)
    answer = _answer(row.get(names["answer"]), where)
    answers, scores = _answers(row, names, where)
    stronger = _answer(row.get(names["stronger"]), where) if "stronger" in names else None
    own = row.get(names["id"])
    tools = _tools(row.get(names["tools"]), names["tools"], where)
    id = content_id(messages, answer, answers, scores, tools, stronger) if own in (None, "") else _clean(str(own))
    labels = {name: _label(row[names[name]], names[name], where) for name in LABELS if row.get(names[name]) is not None}
    return Prompt(id, messages, answer, answers, scores, labels, tools, stronger)


def _tools(value: Any, name: str, where: str) -> Tools:
    """Definitions of tools: a list of them, or that list as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {name} is text that is no JSON ({error}); give a list of tools") from error
    if value is None or value == "" or value == []:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{where}: {name} is {type(value).__name__}, not a list of tool definitions")
    return tuple(_cleaned(tool) for tool in value)


def _label(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(
            f"{where}: {name} is {value!r}, not text or a whole number; name another column (or none that is "
            f"there) under prompts.columns"
        )
    return _clean(str(value))


def _messages(value: Any, where: str) -> Messages:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: the prompt is empty; every row needs text")
        return ({"role": "user", "content": _clean(value)},)
    turns = list(value) if isinstance(value, list | tuple) or hasattr(value, "tolist") else []
    if not turns:
        raise UserError(f"{where}: the prompt is {type(value).__name__}, not text or a list of messages")
    messages = tuple(_message(turn, where) for turn in turns)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with an assistant turn; move its text to the answer column")
    return messages


def _message(turn: Any, where: str) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    content = _joined_parts(content)
    calls = role in _ROLES and isinstance(turn.get("tool_calls"), list) and turn["tool_calls"]
    if role not in _ROLES or not (isinstance(content, str) or (content is None and calls)):
        raise UserError(
            f"{where}: a message of the prompt is not {{role, content}} with text content and a role of "
            f"{', '.join(_ROLES)}"
        )
    more = {key: value for key, value in turn.items() if key not in ("role", "content") and value not in (None, "", [])}
    for key, value in more.items():
        kind = _MESSAGE_KEYS.get(key)
        if kind is None:
            allowed = ", ".join(("role", "content", *_MESSAGE_KEYS))
            raise UserError(
                f"{where}: a message of the prompt has the key {key!r}, which no model is sent; remove it "
                f"(allowed: {allowed})"
            )
        if not isinstance(value, kind):
            raise UserError(f"{where}: {key} of a message is {type(value).__name__}, not {kind.__name__}")
    return {"role": role, "content": content if content is None else _clean(content), **_cleaned(more)}


_MESSAGE_KEYS = {"name": str, "tool_calls": list, "tool_call_id": str, "reasoning_content": str}
"""What a message may have beside role and content."""


def _joined_parts(content: Any) -> Any:
    """Content in parts as one text, where all of them are text; any other content as it is."""
    parts = list(content) if isinstance(content, list | tuple) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    return "".join(texts) if parts and len(texts) == len(parts) and all(isinstance(t, str) for t in texts) else content


def _cleaned(value: Any) -> Any:
    """`_clean` for every text in a value."""
    if isinstance(value, Mapping):
        return {key: _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(inner) for inner in value]
    return _clean(value) if isinstance(value, str) else value


def _answer(value: Any, where: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        if value[0].get("tool_calls"):
            raise UserError(f"{where}: the answer calls a tool; only text can be compared or revised")
        return _answer(_joined_parts(value[0].get("content")), where)  # one assistant message
    raise UserError(f"{where}: the answer is {type(value).__name__}, not text")


_SCORE_NAMES = ("score", "overall_score", "rating")


def _answers(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Several ready answers and their scores: two lists, or UltraFeedback's `completions` (response, overall_score).

    A score that is missing (null, NaN, infinite) is NaN; where all are, the answers have none.
    """
    entries = row.get(names["answers"]) or row.get("completions") or []
    scores = row.get(names["scores"])
    if not isinstance(entries, list | tuple) or (scores is not None and not isinstance(scores, list | tuple)):
        raise UserError(f"{where}: answers and scores must be lists, one score an answer")
    if entries and isinstance(entries[0], Mapping):
        scores = [next((e[n] for n in _SCORE_NAMES if e.get(n) is not None), None) for e in entries]
        entries = [entry.get("response", entry.get("content", entry.get("text"))) for entry in entries]
    if any(not isinstance(entry, str) for entry in entries):
        raise UserError(f"{where}: an entry of answers is not text")
    if len(entries) == 1:
        raise UserError(f"{where}: only one entry in answers; a comparison needs two (a lone answer goes to `answer`)")
    if scores is not None and len(scores) != len(entries):
        raise UserError(f"{where}: {len(entries)} answers but {len(scores)} scores; give one score an answer")
    try:
        numbers = [math.nan if score is None else float(score) for score in scores or ()]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a score is not a number ({error})") from error
    known = [number if math.isfinite(number) else math.nan for number in numbers]
    return tuple(map(_clean, entries)), () if all(map(math.isnan, known)) else tuple(known)


def _clean(text: str) -> str:
    """Half of a surrogate pair cannot be written as UTF-8; it becomes the replacement character."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _rows(source: PromptSource) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of every row."""
    with read_here(source.path) as path:
        if kind_of(path) is None and not path.is_file():
            yield from _dataset(source, str(path))
            return
        told = public_path(source.path)
        for where, row in file_rows(path, "prompt file"):
            yield where.replace(str(path), told, 1), row


def kind_of(path: Path) -> str | None:
    """The suffix of a file that is read row by row, the `.gz` of a packed one left out; None for any other."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in KINDS and (suffix != ".parquet" or path.suffix != ".gz") else None


def file_rows(path: Path, what: str = "file") -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every row of a file. Raises UserError for what cannot be read, with its place."""
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{what} {path} is of no kind that is read: {', '.join(KINDS)}, and text packed as .gz")
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"{what} {path} is empty; give at least one row")
    try:
        yield from KINDS[kind](path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is no whole .gz file ({one_line(error)}); pack it again") from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _decoded(line: bytes, where: str, encoding: str = "utf-8") -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8") from error


def _numbered(path: Path, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line that is not blank. Raises UserError for a line that is not JSON."""
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            text = _decoded(line, where, "utf-8-sig" if number == 1 else "utf-8")
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        text = _decoded(file.read(), str(path), "utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # JSON Lines under another name
            yield from read_jsonl(path)
            return
        raise UserError(f"{path}: not JSON ({error}); mend that place") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {type(rows).__name__}, not a list of rows; use a list, or JSONL")
    yield from _numbered(path, rows)


_CSV_FAULTS = {
    "unexpected end": "a quote opens a cell and none closes it",
    "expected after": "text follows a cell in quotes",
}


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)
    separator = "\t" if kind_of(path) == ".tsv" else ","
    with _open(path) as file:
        lines = (
            _decoded(line, f"{path}, line {number}", "utf-8-sig" if number == 1 else "utf-8")
            for number, line in enumerate(file, 1)
        )
        rows = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            header = rows.fieldnames or ()
            if twice := next((name for number, name in enumerate(header) if name and name in header[:number]), None):
                raise UserError(f"{path}, line 1: two columns are called {twice!r}; rename one of them")
            yield from _numbered(path, rows)
        except csv.Error as error:
            words = next((words for part, words in _CSV_FAULTS.items() if part in str(error)), error)
            raise UserError(
                f"{path}, line {rows.line_num + 1}: not CSV ({words}); put a cell that has quotes in quotes, and write "
                "those within it twice"
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    try:
        yield from _numbered(path, parquet_rows(path, 1000, padded=False))
    except pa.ArrowException as error:
        raise UserError(f"{path}: not Parquet ({one_line(error)})") from error


def parquet_rows(path: Path, at_once: int, *, padded: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, `at_once` in memory; by its default pyarrow keeps whole files.

    `padded`: with the nulls that Arrow fills structs up with.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 14) as file:
        json_columns = [one.name for one in file.schema_arrow if is_json(one.type)]
        for batch in file.iter_batches(batch_size=at_once):
            for row in batch.to_pylist():
                row = row if padded else {name: unpadded(value) for name, value in row.items()}
                yield row | {
                    name: [json.loads(text) for text in row[name]] for name in json_columns if row[name] is not None
                }


def is_json(type: Any) -> bool:
    """Whether an Arrow type is a list of JSON values."""
    import pyarrow as pa

    return pa.types.is_list(type) and isinstance(type.value_type, pa.JsonType)


def unpadded(value: Any) -> Any:
    """A value of Arrow without the nulls that its structs were filled up with."""
    if isinstance(value, Mapping):
        return {key: unpadded(inner) for key, inner in value.items() if inner is not None}
    return [unpadded(inner) for inner in value] if isinstance(value, list) else value


KINDS = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet
}  # fmt: skip


def is_saved(folder: Path) -> bool:
    """True for a folder of `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_split(path: str, split: str, **options: Any) -> Any:
    """A split of a folder of `save_to_disk`, or of `datasets.load_dataset`, which is never answered from its cache with
    what a folder held before.

    The library files a local folder that has a card under the folder's bare name and the card, whatever the data files
    hold: the folder rebuilt, or another one of its name, would come back with the old rows. So what its files are now
    goes into the key.
    """
    import datasets

    folder = Path(path)
    if is_saved(folder):
        saved = datasets.load_from_disk(path)
        if not isinstance(saved, dict):
            return saved
        if split not in saved:
            raise UserError(f"dataset {path} has no split {split!r}; found: {', '.join(saved)}")
        return saved[split]
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        options = {"description": content_hash(state), **options}
    return datasets.load_dataset(path, split=split, **options)


def _dataset(source: PromptSource, path: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = load_split(path, source.split)
        kinds = {name: "Json(" in str(kind) for name, kind in rows.features.items()}
    except UserError:
        raise
    except Exception as error:  # a name that is not there, no network, an unknown split: told with the library's words
        why = "" if Path(path).exists() else "no such file, and "
        raise UserError(f"prompts {source.path!r}: {why}load_dataset says: {words_of(error)}") from error
    read = ({name: value if kinds[name] else unpadded(value) for name, value in row.items()} for row in rows)
    yield from _numbered(Path(source.path), read)
