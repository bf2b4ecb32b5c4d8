"""Text to token ids: control tokens inside texts are encoded as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowError(UserError):
    """An error in one row; the message does not include its number."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of one row. `masks` has a 1 for each trained token of an answer, and is empty if all are trained.

    `notes` are keys of `rendering.NOTES`.
    """

    prompt: list[int]
    answers: list[list[int]]
    masks: list[list[int]]
    notes: set[str] = field(default_factory=set)


def control_tokens(tokenizer: PreTrainedTokenizerBase, eos: frozenset[int]) -> list[str]:
    """The texts of tokens that only a template may write: special tokens and ends of turns. Markers of thoughts are
    part of an answer's text, and not among them."""
    tokens = tokenizer.added_tokens_decoder.items()
    texts = [token.content for id, token in tokens if token.special or id in eos]
    return [text for text in texts if text.strip() and "think" not in text.lower()]


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the longest common prefix of two sequences."""
    if a == b[: len(a)]:
        return len(a)
    differing = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def no_end_message(tokenizer: PreTrainedTokenizerBase) -> str:
    """The message for an answer without an end of turn."""
    return (
        "an answer does not end with the end of turn, so the model would never learn to stop; make the chat template "
        f"end an answer with eos_token ({tokenizer.eos_token}) or name its end in generation_config.eos_token_id"
    )


def any_of(control: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Ids of a text in which transformers' `mark_control_tokens` has marked the texts that are no control tokens."""
    from transformers.utils.chat_template_utils import encode_marked_chat

    begin = [] if options else [token for token in encode_text(tokenizer, "") if token == tokenizer.bos_token_id]
    try:
        return begin + encode_marked_chat(tokenizer, text)
    except Exception as error:
        raise RowError(f"the text of a control token cannot be encoded as text: {one_line(error)}") from error


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # tokenizers raise anything, and the row's number has to be added
        raise RowError(f"the tokenizer cannot encode {one_line(text, 40)!r}: {one_line(error)}") from error
