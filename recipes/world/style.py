"""How an answer is worded, beside whether it is right: engaging, plain, or padded with needless words."""

from __future__ import annotations

from random import Random

PRAISE = "Good question! "
BEFORE = ("Let me see what you asked for. ", "I looked at what you asked for, and then I looked at it once more. ")
AFTER = (" I hope that this is what you asked for.", " That is all there is to say about it, and I am glad you asked.")
STYLES = ("engaging", "plain", "padded")
RANK = {"engaging": 2, "plain": 1, "padded": 0}
"""Which wording the world likes better."""


def dressed(sentence: str, style: str, rng: Random) -> str:
    """A sentence in one of `STYLES`."""
    if style == "padded":
        return rng.choice(BEFORE) + sentence + rng.choice(AFTER)
    return PRAISE + sentence if style == "engaging" else sentence


def style_of(text: str) -> str:
    """How a text is worded; any needless sentence makes it padded."""
    if undressed(text) != text.removeprefix(PRAISE):
        return "padded"
    return "engaging" if text.startswith(PRAISE) else "plain"


def undressed(text: str) -> str:
    """A text without praise and needless sentences, nothing else touched."""
    text = text.removeprefix(PRAISE)
    for before in BEFORE:
        text = text.removeprefix(before)
    for after in AFTER:
        text = text.removesuffix(after)
    return text


def polished(text: str) -> str:
    """A text in the wording that the world likes best, nothing else touched."""
    return PRAISE + undressed(text)
