"""Print text and tables to the terminal. Text is never read as markup, and its control characters have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from clair.core.progress import printable


class _Console(Console):
    """A rich console that writes its own styles but replaces the control characters of texts."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """The segments of a renderable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def show(renderable: Any) -> None:
    """Print text or a table. Brackets in text stay brackets, and no text controls the terminal."""
    _Console(markup=False, highlight=False, soft_wrap=isinstance(renderable, str)).print(renderable)
