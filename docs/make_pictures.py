"""Draw the README's pictures from a quickstart that has run: a few pairs as diffs, and what training did to them.

make quickstart && python docs/make_pictures.py
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from clair.data.dataset import read_rows
from clair.terminal import pair_panel

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "quickstart"
IMAGES = ROOT / "docs" / "images"
NO_FONTS = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""rich's picture of a terminal without the fonts that it would load from elsewhere."""


def draw_pairs(count: int = 3) -> None:
    """docs/images/pairs.svg: the first pairs as `clair show` prints them."""
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True)
    for _, row in zip(range(count), read_rows(RUN / "pairs", ["train"]), strict=False):
        console.print(pair_panel(row))
    drawn = console.export_svg(
        title="clair show runs/quickstart/pairs", theme=DEFAULT_TERMINAL_THEME, code_format=NO_FONTS, unique_id="pairs"
    )
    (IMAGES / "pairs.svg").write_text(drawn, "utf-8")


def main() -> None:
    """Write both pictures."""
    if not (RUN / "apo_zero" / "dynamics.png").is_file():
        sys.exit(f"{RUN.relative_to(ROOT)} holds no finished quickstart; run: make quickstart")
    draw_pairs()
    shutil.copyfile(RUN / "apo_zero" / "dynamics.png", IMAGES / "quickstart.png")


if __name__ == "__main__":
    main()
