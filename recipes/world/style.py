"""The style of an answer, independent of its correctness: engaging, plain, or padded with needless words."""

from __future__ import annotations

from random import Random

PRAISE = "Good question! "
PREFIXES = ("Let me see what you asked for. ", "I looked at what you asked for, and then I looked at it once more. ")
SUFFIXES = (
    " I hope that this is what you asked for.",
    " That is all there is to say about it, and I am glad you asked.",
)
STYLES = ("engaging", "plain", "padded")
RANK = {"engaging": 2, "plain": 1, "padded": 0}
"""The world's preference for a style; higher is better."""


def add_style(sentence: str, style: str, rng: Random) -> str:
    """A sentence in one of `STYLES`."""
    if style == "padded":
        return rng.choice(PREFIXES) + sentence + rng.choice(SUFFIXES)
    return PRAISE + sentence if style == "engaging" else sentence


def style_of(text: str) -> str:
    """The style of a text; any needless sentence makes it padded."""
    if remove_style(text) != text.removeprefix(PRAISE):
        return "padded"
    return "engaging" if text.startswith(PRAISE) else "plain"


def remove_style(text: str) -> str:
    """A text without praise and needless sentences, otherwise unchanged."""
    text = text.removeprefix(PRAISE)
    for prefix in PREFIXES:
        text = text.removeprefix(prefix)
    for suffix in SUFFIXES:
        text = text.removesuffix(suffix)
    return text


def improve_style(text: str) -> str:
    """A text in the world's preferred style, otherwise unchanged."""
    return PRAISE + remove_style(text)
