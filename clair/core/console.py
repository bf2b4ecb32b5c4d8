"""Print text to the terminal: never read as markup, never able to steer it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from clair.core.progress import printable


class _Console(Console):
    """Prints what texts say, whatever they hold: rich writes its own styles, and no control character of theirs."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """The segments of a renderable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def show(what: Any) -> None:
    """Print text or a table; brackets in text stay brackets, and no text steers the terminal."""
    _Console(markup=False, highlight=False, soft_wrap=isinstance(what, str)).print(what)
