"""Download the benchmark: upstream's files at one pinned commit, checked by SHA-256 before any of them is written.

Upstream keeps the judge's prompts in a Python file. It is parsed as a syntax tree and never run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

from apo.evaluation.mixeval.benchmark import (
    CHECKSUMS,
    COMMIT,
    FILES_SHA256,
    FOLDERS,
    JUDGE_PROMPTS,
    JUDGE_SHA256,
    UPSTREAM,
    VERSIONS,
    HardOrFull,
)
from apo.evaluation.records.mixeval import SPLITS, Split
from clair.core.errors import UserError, check_name
from clair.core.files import write_atomically, write_json

BASE = f"https://raw.githubusercontent.com/{UPSTREAM}/{COMMIT}"
_DATA_FILE = "mix_eval/data/mixeval-{version}/{folder}/{split}.json"
_JUDGE_SOURCE = "mix_eval/prompts/judge_prompts.py"
_LAMBDA_NAMES: Mapping[Split, str] = {
    "free-form": "gpt_judge_for_closeended_freeform",
    "multiple-choice": "gpt_judge_for_closeended_multiplechoice",
}
_PLACEHOLDERS = {"prompt": "{P}", "gold_ans": "{G}", "options": "{G}", "response": "{R}"}
_TIMEOUT = 60.0
_MAX_BYTES = 256 * 2**20


def fetch(
    out: str | Path, versions: Sequence[str] = VERSIONS, splits: Sequence[HardOrFull] = ("hard",), base: str = BASE
) -> list[str]:
    """Download questions and judge prompts into the data folder `out`. Returns the names of the files written.

    The full benchmark has no known hashes: those of the downloaded files are written to checksums.json and checked from
    then on. Raises UserError, with nothing written, if the network or a file is missing or a file has another hash.
    """
    for version in versions:
        check_name("MixEval has no version", version, VERSIONS, "known")
    folder = Path(out)
    files: dict[str, bytes] = {}
    for version in versions:
        for split in splits:
            for kind in SPLITS:
                content = _download(base, _DATA_FILE.format(version=version, folder=FOLDERS[split], split=kind))
                expected = FILES_SHA256[version, kind] if split == "hard" else None
                files[f"{version}/{FOLDERS[split]}/{kind}.json"] = _verify_sha256(content, expected, base, kind)
    prompts = parse_judge_prompts(_download(base, _JUDGE_SOURCE).decode("utf-8", "replace"))
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_json(folder / JUDGE_PROMPTS, {"upstream_commit": COMMIT, **prompts})
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    earlier = json.loads((folder / CHECKSUMS).read_text("utf-8"))["sha256"] if (folder / CHECKSUMS).is_file() else {}
    write_json(folder / CHECKSUMS, {"upstream": UPSTREAM, "commit": COMMIT, "sha256": {**earlier, **sums}})
    return [*files, JUDGE_PROMPTS, CHECKSUMS]


def parse_judge_prompts(source: str) -> dict[str, dict[str, str]]:
    """Parse the judge's messages in upstream's Python source. Raises UserError if they are missing or altered."""
    try:
        messages = dict(_messages(ast.parse(source)))
    except (SyntaxError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"upstream's {_JUDGE_SOURCE} cannot be read ({error}); is this commit {COMMIT[:7]}?") from error
    for split, name in _LAMBDA_NAMES.items():
        text = messages.get(name, {}).get("user", "")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if sha256 != JUDGE_SHA256[split]:
            raise UserError(
                f"upstream's {_JUDGE_SOURCE} holds another {split} judge message: its sha256 is {sha256}, expected "
                f"{JUDGE_SHA256[split]}"
            )
    return {split.replace("-", "_"): messages[name] for split, name in _LAMBDA_NAMES.items()}


def _messages(tree: ast.Module) -> list[tuple[str, dict[str, str]]]:
    """(name, text by role) of every `name = lambda ...: [{"role": ..., "content": f"..."}, ...]`."""
    messages = []
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Lambda)
            and isinstance(node.value.body, ast.List)
        ):
            assert isinstance(node.targets[0], ast.Name)
            messages.append((node.targets[0].id, dict(_message(item) for item in node.value.body.elts)))
    return messages


def _message(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Dict):
        raise ValueError("a message is no dict")
    fields = {ast.literal_eval(key): value for key, value in zip(node.keys, node.values, strict=True) if key}
    return _text(fields["role"]), _text(fields["content"])


def _text(node: ast.expr) -> str:
    """A string, or an f-string with placeholders in place of its names."""
    if not isinstance(node, ast.JoinedStr):
        return str(ast.literal_eval(node))
    return "".join(
        _PLACEHOLDERS[piece.value.id]
        if isinstance(piece, ast.FormattedValue) and isinstance(piece.value, ast.Name)
        else ast.literal_eval(piece)
        for piece in node.values
    )


def _verify_sha256(content: bytes, expected: str | None, base: str, kind: str) -> bytes:
    sha256 = hashlib.sha256(content).hexdigest()
    if expected is not None and sha256 != expected:
        raise UserError(
            f"{base} gave another {kind}.json: its sha256 is {sha256}, expected {expected}; nothing is written"
        )
    return content


def _download(base: str, path: str) -> bytes:
    url = f"{base.rstrip('/')}/{path}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:  # noqa: S310 (https, or what the user typed)
            content: bytes = response.read(_MAX_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{url} answers {error.code}; the file is not there") from error
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f"{base} cannot be reached ({error}); run `apo eval fetch-mixeval` on a machine with network and copy the "
            f"folder here, or clone github.com/{UPSTREAM} at {COMMIT[:7]} there and give --from file:///ITS/PATH"
        ) from error
    return content
