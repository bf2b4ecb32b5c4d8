"""Find texts to which a chat template has been applied before: rendering them would write its marks twice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from apo.data.encoding import RowError

_RENDERED = re.compile(
    r"\s*(<s>\s*|<bos>\s*|<\|begin_of_text\|>\s*)?(<\|im_start\|>\s*(system|user|assistant)\b"
    r"|<\|start_header_id\|>\s*(system|user|assistant)\b|<start_of_turn>\s*(user|model)\b"
    r"|<\|start\|>\s*(system|developer|user|assistant)\b|\[INST\](?=.*\[/INST\])|<\|(system|user|assistant)\|>"
    r"|<｜(begin▁of▁sentence|User|Assistant)｜>|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<\|header_start\|>"
    r"|\[gMASK\]|<extra_id_[01]>\s*(System|User|Assistant)\b)",
    re.DOTALL,
)
"""The beginning of a text to which a template of ChatML, Llama, Gemma, Harmony, Mistral, Phi, DeepSeek, Granite,
Command, GLM or Nemotron has already been applied."""
_OPENING_CHARACTERS = 60
"""Characters at the start of a text that are searched for the marks of a template."""


def check_not_rendered(columns: Mapping[str, Sequence[Mapping[str, Any]]], end_texts: tuple[str, ...]) -> None:
    """Raises RowError for a text that has a template's marks around it: the template would write them again.

    `columns` holds the messages of the prompt and of each answer; `end_texts` are the tokens that end a turn.
    """
    for column, messages in columns.items():
        for number, message in enumerate(messages, 1):
            if mark := _RENDERED.match(message["content"]):
                raise RowError(_already_rendered_message(number, column, mark.group()))
        if column != "prompt" and messages[-1]["content"].rstrip().endswith(end_texts):
            raise RowError(
                f"an answer ends with the end of turn twice: the text of {column!r} ends with it; take it out of "
                "the text, the chat template writes it"
            )


def check_opening_marks(
    columns: Mapping[str, Sequence[Mapping[str, Any]]], texts: Sequence[str], marks: re.Pattern[str]
) -> None:
    """Raises RowError for a text that begins as this template begins a turn; `texts` are the rendered conversations."""
    for (column, messages), text in zip(columns.items(), (texts[0], *texts), strict=True):
        for number, message in enumerate(messages, 1):
            head = message["content"].strip()[:_OPENING_CHARACTERS]
            preceding = text.partition(head)[0].rstrip() if head else ""
            for opening in (head[:length].rstrip() for length in range(len(head), 0, -1)):
                if preceding.endswith(opening) and marks.search(opening):
                    raise RowError(_already_rendered_message(number, column, opening))


def _already_rendered_message(number: int, column: str, mark: str) -> str:
    return (
        f"message {number} of {column!r} begins with {mark.strip()!r}: a chat template has already been applied to it; "
        "give messages, or the text alone"
    )
