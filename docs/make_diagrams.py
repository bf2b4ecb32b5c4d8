"""Draw the diagrams of the docs: prompts to a compared model, folders by layer, the way of a row and of a pair.

python docs/make_diagrams.py            # writes docs/images/*.svg; the folders come from pyproject.toml
python docs/make_diagrams.py --check    # exits with 1 if a picture is out of date
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
COLORS = {"data": "#e8f1fb", "model": "#fdf0dc", "code": "#eef5ea"}
"""Fill of a box: data on disk, a model, code."""
WIDTH, HEIGHT, GAP = 142, 46, 30


@dataclass(frozen=True)
class Box:
    """A box of the grid: its column and row, its kind (a key of `COLORS`), and one or two lines of text."""

    column: float
    row: float
    kind: str
    text: str
    detail: str = ""
    columns: int = 1

    @property
    def left(self) -> float:
        """x of the left edge, in pixels."""
        return 12 + self.column * (WIDTH + GAP)

    @property
    def width(self) -> int:
        """Width in pixels; a box over several columns spans their gaps."""
        return self.columns * (WIDTH + GAP) - GAP

    @property
    def top(self) -> float:
        """y of the upper edge, in pixels."""
        return 12 + self.row * (HEIGHT + GAP)


def draw(boxes: Sequence[Box], arrows: Sequence[tuple[int, int]], title: str) -> str:
    """An SVG of boxes and of arrows `(from, to)` between them, on white, which every theme can show."""
    width = max(box.left + box.width for box in boxes) + 12
    height = max(box.top for box in boxes) + HEIGHT + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="system-ui, sans-serif">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#444"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#fff"/>',
        *(_arrow(boxes[start], boxes[end]) for start, end in arrows),
        *map(_box, boxes),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _box(box: Box) -> str:
    anchor = f'<text x="{box.left + box.width / 2:g}" text-anchor="middle"'
    baseline = box.top + (20 if box.detail else 28)
    text = f'{anchor} y="{baseline:g}" font-size="14" fill="#111">{escape(box.text)}</text>'
    if box.detail:
        text += f'{anchor} y="{box.top + 36:g}" font-size="11" fill="#444">{escape(box.detail)}</text>'
    return (
        f'<rect x="{box.left:g}" y="{box.top:g}" width="{box.width}" height="{HEIGHT}" rx="6" '
        f'fill="{COLORS[box.kind]}" stroke="#888"/>{text}'
    )


def _arrow(start: Box, end: Box) -> str:
    if start.row == end.row:
        right = end.column > start.column
        x1, x2 = (start.left + start.width, end.left - 2) if right else (start.left, end.left + end.width + 2)
        y1 = y2 = start.top + HEIGHT / 2
    else:
        x1, x2 = start.left + start.width / 2, end.left + end.width / 2
        y1, y2 = start.top + HEIGHT, end.top - 2
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="#444" fill="none" marker-end="url(#head)"/>'


def overview() -> str:
    """Prompts to a compared model, as the two commands do it."""
    boxes = [
        Box(0, 0, "data", "prompts", "prompts.jsonl"),
        Box(1, 0, "model", "target", "answers"),
        Box(2, 0, "model", "reviser", "improves minimally"),
        Box(3, 0, "data", "pairs", "rejected and chosen"),
        Box(3, 1, "code", "APO", "apo train"),
        Box(2, 1, "model", "trained model"),
        Box(1, 1, "code", "comparison", "apo compare"),
        Box(0, 1, "data", "difference", "with an interval"),
    ]
    return draw(boxes, [(index, index + 1) for index in range(7)], "From prompts to a compared model")


def folders() -> str:
    """The folders of both packages, a line of boxes for each layer; a folder imports only from lines below its own."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers" and c.get("exhaustive")}
    deepest = max(map(len, layers.values()))
    boxes = []
    for column, package, detail in ((0.0, "clair", ""), (2.4, "apo", "also imports clair")):
        lines = [layer.split(" : ") for layer in layers[package]]
        for row, names in enumerate(lines, deepest - len(lines)):
            boxes += [Box(column + index, row * 0.75, "code", name) for index, name in enumerate(names)]
        boxes.append(Box(column, deepest * 0.75, "data", package, detail, columns=max(map(len, lines))))
    return draw(boxes, [], "The folders of clair and apo by layer")


def ways() -> str:
    """A row through a build (above), and a pair through a training step (below)."""
    boxes = [
        Box(0, 0, "data", "prompt", "data/prompt_sources"),
        Box(1, 0, "code", "steps", "generate, revise, keep"),
        Box(2, 0, "code", "ModelClient", "claim, send, store"),
        Box(3, 0, "model", "endpoint", "or local model"),
        Box(2, 1, "data", "ledger", "one entry a request"),
        Box(1, 1, "data", "dataset folder", "data/dataset"),
        Box(0, 2.3, "data", "pair", "data/sources"),
        Box(1, 2.3, "code", "chat template", "data/rendering"),
        Box(2, 2.3, "code", "packed row", "packing"),
        Box(3, 2.3, "code", "log-probs", "policy and reference"),
        Box(4, 2.3, "code", "objective", "losses/objectives"),
    ]
    arrows = [(0, 1), (1, 2), (2, 3), (2, 4), (1, 5), (6, 7), (7, 8), (8, 9), (9, 10)]
    return draw(boxes, arrows, "The way of a row through a build, and of a pair through a training step")


PICTURES = {"overview": overview, "folders": folders, "ways": ways}


def main() -> None:
    """Write the pictures, or check them."""
    stale = []
    for name, picture in PICTURES.items():
        file, text = IMAGES / f"{name}.svg", picture()
        if "--check" not in sys.argv[1:]:
            file.write_text(text, "utf-8")
        elif not file.is_file() or file.read_text("utf-8") != text:
            stale.append(file.name)
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/make_diagrams.py")


if __name__ == "__main__":
    main()
