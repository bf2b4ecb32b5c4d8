"""Chat templates that write the date or the time: let them write a given day."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def writes_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template can write the date or the time (`strftime_now`)."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


@contextmanager
def write_day(template: str, day: date) -> Iterator[None]:
    """Make a chat template's `strftime_now` write `day` in this context.

    It is a global function of the compiled template, which transformers caches; no variable can replace it, because
    transformers passes functions as text.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = _compile_jinja_template(template).globals
    names["strftime_now"] = partial(_strftime_on, day)
    try:
        yield
    finally:
        del names["strftime_now"]


def _strftime_on(day: date, format: str) -> str:
    """`strftime_now(format)` of a template on `day`. A format with a time of day uses the clock."""
    midnight, later = (datetime.combine(day, moment) for moment in (time.min, time(13, 14, 15, 161718)))
    text = midnight.strftime(format)
    return text if later.strftime(format) == text else datetime.now().strftime(format)
