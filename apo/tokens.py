"""Pairs as token ids: tokenised once, looked at one by one, never cut.

A pair becomes `prompt_ids`, `chosen_ids` and `rejected_ids`, the columns that TRL's collator reads. The response starts
where prompt and prompt-with-answer part, and ends with the end of turn: what a template writes after it (ChatML's line
break) is not said by the model and not trained. A pair longer than `max_length` on either side is dropped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clair.recipe import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedTokenizerBase

COLUMNS = ("prompt", "chosen", "rejected")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Tokenized:
    """Tokenised pairs, how many were dropped for which reason, and what the user should know."""

    dataset: Dataset
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def end_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> frozenset[int]:
    """The token ids that end a turn: the tokenizer's end of sequence and those the model generates up to."""
    ends = getattr(generation, "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return frozenset(end for end in (tokenizer.eos_token_id, *ends) if end is not None)


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    ends: frozenset[int],
    name: str = "train",
    num_proc: int | None = None,
) -> Tokenized:
    """`dataset` with the three id columns, pairs longer than `max_length` left out.

    Raises UserError, in one line with the first row at fault, for a missing column, chosen equal to rejected, an answer
    that does not end with the end of turn or ends twice, and a prompt that begins twice.
    """
    if set(ID_COLUMNS) <= set(dataset.column_names):
        return Tokenized(dataset)
    if missing := [column for column in COLUMNS if column not in dataset.column_names]:
        found = ", ".join(dataset.column_names) or "none"
        raise UserError(f"{name} dataset has no column {missing[0]!r}; found: {found}; needed: {', '.join(COLUMNS)}")
    arguments = {"tokenizer": tokenizer, "ends": sorted(ends), "max_length": max_length}
    encoded = dataset.map(_encode, fn_kwargs=arguments, num_proc=num_proc, desc=f"Tokenizing {name}")
    verdicts = encoded["_verdict"][:]
    at_fault = [row for row, verdict in enumerate(verdicts) if verdict in _FAULTS]
    if at_fault:
        row = at_fault[0]
        which = f"row {row}" + (f" (id {encoded[row]['id']})" if "id" in encoded.column_names else "")
        count = f"{len(at_fault):,} of {len(verdicts):,} rows; first " if len(at_fault) > 1 else ""
        raise UserError(f"{name} dataset, {count}{which}: {_FAULTS[verdicts[row]].format(eos=tokenizer.eos_token)}")
    notes = []
    if parted := sum(encoded["_prompt_parts"][:]):
        notes.append(
            f"{name}: the chat template renders the prompt alone otherwise than before an answer in {parted:,} of "
            f"{len(verdicts):,} pairs; the answer is trained from where the two part"
        )
    kept = [row for row, verdict in enumerate(verdicts) if not verdict]
    encoded = encoded.remove_columns(["_verdict", "_prompt_parts"])
    if len(kept) == len(verdicts):
        return Tokenized(encoded, {}, notes)
    return Tokenized(encoded.select(kept), {"too_long": len(verdicts) - len(kept)}, notes)


_FAULTS = {
    "equal": "chosen is equal to rejected, so there is nothing to prefer; remove such rows",
    "double_start": "the prompt begins with the beginning-of-sequence token twice; let the chat template or the text "
    "write it, not both",
    "no_end": "an answer does not end with the end of turn, so the model would never learn to stop; make the chat "
    "template end an answer with eos_token ({eos}) or name its end in generation_config.eos_token_id",
    "double_end": "an answer ends with the end of turn twice; take it out of the text, the chat template writes it",
}


def _encode(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, ends: list[int], max_length: int | None
) -> dict[str, Any]:
    prompt, chosen, rejected = _render(example, tokenizer)
    start = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    responses = [_until_end(ids[start:], set(ends), tokenizer) for ids in (chosen, rejected)]
    return {
        "prompt_ids": prompt[:start],
        "chosen_ids": responses[0],
        "rejected_ids": responses[1],
        "_verdict": _verdict(prompt[:start], responses, set(ends), tokenizer.bos_token_id, max_length),
        "_prompt_parts": start < len(prompt),
    }


def _render(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Ids of the prompt alone and of the prompt with either answer."""
    prompt, chosen, rejected = (example[column] for column in COLUMNS)
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        whole = [prompt + (answer if answer.endswith(end) else answer + end) for answer in (chosen, rejected)]
        return tuple(tokenizer(text)["input_ids"] for text in (prompt, *whole))
    options = {**(example.get("chat_template_kwargs") or {}), "tools": example.get("tools")}

    def ids(messages: list[dict[str, Any]], **more: Any) -> list[int]:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more, **options)["input_ids"]

    return ids(prompt, add_generation_prompt=True), ids(prompt + chosen), ids(prompt + rejected)


def _until_end(ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` up to their last end of turn, where only white space follows it; `ids` as they are otherwise."""
    last = max((place for place, token in enumerate(ids) if token in ends), default=None)
    if last is None or last == len(ids) - 1 or tokenizer.decode(ids[last + 1 :]).strip():
        return ids
    return ids[: last + 1]


def _verdict(
    prompt: list[int], responses: list[list[int]], ends: set[int], bos: int | None, max_length: int | None
) -> str:
    """What is wrong with a tokenised pair: a key of `_FAULTS`, "too_long", or nothing."""
    if responses[0] == responses[1]:
        return "equal"
    if bos is not None and prompt[:2] == [bos, bos]:
        return "double_start"
    if any(not ids or ids[-1] not in ends for ids in responses):
        return "no_end"
    if any(len(ids) > 1 and ids[-2] in ends for ids in responses):
        return "double_end"
    if max_length is not None and len(prompt) + max(map(len, responses)) > max_length:
        return "too_long"
    return ""


def _common_prefix(one: list[int], other: list[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
