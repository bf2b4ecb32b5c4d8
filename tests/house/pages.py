"""The documentation as data: its pages, code blocks and marked tables. Imported by the tests beside it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRIBUTING = "docs/contributing.md"

_BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<note>[^\n]*?) -->\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_TABLE = re.compile(r"^<!-- (?P<note>[^\n]*?) -->\n+(?P<rows>(?:\|[^\n]*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, the comment right above it, its `title`, and its text."""

    page: str
    line: int
    language: str
    note: str
    title: str
    code: str

    @property
    def location(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def pages() -> dict[str, str]:
    """Every page of documentation by its path."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in files if file.is_file()}


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all pages in these languages."""
    result = []
    for page, text in pages().items():
        for match in _BLOCK.finditer(text):
            if match["language"] in languages:
                title = re.search(r'title="([^"]*)"', match["options"])
                line = text.count("\n", 0, match.start("language")) + 1
                code = textwrap.dedent(match["code"])
                result.append(
                    Block(page, line, match["language"], match["note"] or "", title[1] if title else "", code)
                )
    return result


@dataclass(frozen=True)
class Command:
    """A line of a shell block, put together where it goes on after a backslash; `needs`: what a test cannot give it."""

    location: str
    page: str
    text: str
    needs: str


def commands() -> list[Command]:
    """Every command of every shell block, in order.

    What a command needs stands behind it, `# needs: ...`, or above its block, `<!-- needs: ... -->`.
    """
    result = []
    for block in blocks("sh", "bash"):
        above = block.note.partition("needs:")[2].strip() if block.note.startswith("needs:") else ""
        for line in block.code.replace("\\\n", " ").splitlines():
            text, _, remark = line.partition(" #")
            needs = remark.partition("needs:")[2].strip() or above
            pieces = (piece.strip() for piece in re.split(r"\s+(?:&&|\|)\s+", text))
            result += [Command(block.location, block.page, p, needs) for p in pieces if p and not p.startswith("#")]
    return result


def tables(kind: str) -> list[tuple[str, str, list[list[str]]]]:
    """(page, what follows `kind:` in the comment above it, rows with the head) of each table marked `<!-- kind -->`."""
    result = []
    for page, text in pages().items():
        for match in _TABLE.finditer(text):
            name, _, argument = match["note"].partition(":")
            if name.strip() == kind:
                head, _, *rows = (_cells(line) for line in match["rows"].splitlines())
                result.append((page, argument.strip(), [head, *rows]))
    return result


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def contributions() -> dict[str, list[Block]]:
    """The blocks of each `## Add ...` that has commands at its end."""
    text = pages()[CONTRIBUTING]
    heads = [(text.count("\n", 0, m.start()) + 1, m[1]) for m in re.finditer(r"^## (.*)$", text, re.MULTILINE)]
    blocks_by_name: dict[str, list[Block]] = {}
    for block in blocks("diff", "python", "sh"):
        name = next((name for line, name in reversed(heads) if line < block.line), "")
        if block.page == CONTRIBUTING and name.startswith("Add "):
            blocks_by_name.setdefault(name, []).append(block)
    return blocks_by_name
