"""Render a row of plain text: it gets the end of sequence and no chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apo.data.encoding import Rendered, RowError, any_of, common_prefix, encode_marked, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_text(
    row: Mapping[str, Any],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    eos: set[int],
    control: Sequence[str],
) -> Rendered:
    """The ids of a row of plain text.

    If the prompt contains control tokens, a template has been applied to the row, and all of them count as control
    tokens. Otherwise they are text, except for an end of turn at the end of an answer.
    """
    prompt, answers = row["prompt"], [row[column] for column in columns]
    endings = [mark for end in sorted(eos) if (mark := tokenizer.decode([end]))]
    bodies = []
    for column, text in zip(columns, answers, strict=True):
        ending = next((mark for mark in endings if text.rstrip().endswith(mark)), None)
        body = text if ending is None else text.rstrip().removesuffix(ending)
        if body.rstrip().endswith(tuple(endings)):
            raise RowError(f"an answer ends with the end of turn twice: {column!r}; take one out")
        bodies.append((body, ending or tokenizer.eos_token))
    has_marks = any(mark in body for body, _ in bodies for mark in control) and not any(
        mark in prompt for mark in control
    )
    if has_marks:
        from transformers.utils.chat_template_utils import mark_control_tokens

        bodies = [(mark_control_tokens(body, any_of(control)), ending) for body, ending in bodies]
    texts = [prompt, *(prompt + body + ending for body, ending in bodies)]
    first, *ids = ((encode_marked if has_marks else encode_text)(tokenizer, text) for text in texts)
    start = min(common_prefix(first, answer) for answer in ids)
    responses = [answer[start:] for answer in ids]
    for column, response in zip(columns, responses, strict=True):
        inner = next((token for token in response[:-1] if token in eos), None)
        if inner is not None:
            mark = tokenizer.decode([inner])
            raise RowError(f"{column!r} goes on after the end of turn {mark}; take the mark out, or give messages")
    if not start:
        raise RowError(
            "no token of the prompt is left, since the tokenizer writes its end and the beginning of an answer as one "
            f"({tokenizer.decode(ids[0][:1])!r}); begin the answers with a space or a line break, or give messages"
        )
    notes = {"parted"} if start < len(first) else set()
    notes |= {"empty"} if not all(body.strip() for body, _ in bodies) else set()
    return Rendered(first[:start], responses, [], notes | ({"marks"} if has_marks else set()))
