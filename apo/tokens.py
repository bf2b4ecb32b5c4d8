"""Pairs and unpaired rows as token ids: tokenised once, looked at one by one, never cut.

A pair becomes `prompt_ids`, `chosen_ids` and `rejected_ids`, the columns that TRL's collator reads. An unpaired row is
a pair without the other response: `rejected_ids` is empty where it is desirable, `chosen_ids` where not. A response
starts where prompt and prompt-with-answer part, and ends with the end of turn: what a template writes after it
(ChatML's line break) is not said by the model and not trained. A row longer than `max_length` on either side is dropped
and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clair.recipe import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from apo.mixture import Mixture

COLUMNS = ("prompt", "chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Tokenized:
    """Tokenised rows, how many were dropped for which reason, and what the user should know."""

    dataset: Dataset
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def size(self, name: str = "train") -> dict[str, int]:
        """How many `pairs` there are; of unpaired rows how many `rows`, and how many `desirable` among them."""
        unpaired = count_unpaired(self.dataset, name)
        return {"pairs": len(self.dataset)} if unpaired is None else {"rows": sum(unpaired), "desirable": unpaired[0]}


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
    objective: Mixture | None = None,
) -> Tokenized:
    """`dataset` with the three id columns, rows longer than `max_length` left out.

    Raises UserError, in one line with the first row at fault, for a missing column, chosen equal to rejected, an answer
    that does not end with the end of turn or ends twice, a prompt that begins twice, a label that is not true or
    false, and unpaired rows under an `objective` that needs pairs.
    """
    if set(ID_COLUMNS) <= set(dataset.column_names):
        _refuse_unpaired(objective, name, count_unpaired(dataset, name) is not None)
        return Tokenized(dataset)
    from datasets import Features, List, Value

    wanted = columns_of(dataset)
    if missing := [column for column in wanted if column not in dataset.column_names]:
        found = ", ".join(dataset.column_names) or "none"
        raise UserError(f"{name} dataset has no column {missing[0]!r}; found: {found}; needed: {', '.join(wanted)}")
    _refuse_unpaired(objective, name, wanted == UNPAIRED_COLUMNS)
    _check_labels(dataset, name)
    arguments = {"tokenizer": tokenizer, "ends": sorted(ends), "max_length": max_length}
    # Said, not inferred: the other responses of unpaired rows are empty, and an empty list has no type.
    features = Features({
        **dataset.features, **dict.fromkeys(ID_COLUMNS, List(Value("int64"))), "_verdict": Value("string"),
        "_prompt_parts": Value("bool"),
    })  # fmt: skip
    encoded = dataset.map(_encode, fn_kwargs=arguments, num_proc=num_proc, features=features, desc=f"Tokenizing {name}")
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
            f"{len(verdicts):,} rows; the answer is trained from where the two part"
        )
    kept = [row for row, verdict in enumerate(verdicts) if not verdict]
    encoded = encoded.remove_columns(["_verdict", "_prompt_parts"])
    dropped = {"too_long": len(verdicts) - len(kept)} if len(kept) < len(verdicts) else {}
    encoded = encoded.select(kept) if dropped else encoded
    if objective is not None and name == "train":
        notes += _balance(count_unpaired(encoded, name), objective)
    return Tokenized(encoded, dropped, notes)


def columns_of(dataset: Dataset) -> tuple[str, str, str]:
    """The columns that rows of this dataset need: those of unpaired rows where there is a completion and no chosen."""
    unpaired = "completion" in dataset.column_names and "chosen" not in dataset.column_names
    return UNPAIRED_COLUMNS if unpaired else COLUMNS


def count_unpaired(dataset: Dataset, name: str = "train") -> tuple[int, int] | None:
    """How many desirable and undesirable rows a tokenised dataset holds, or None where its rows are pairs.

    Raises UserError for a row without any response, and for pairs and unpaired rows in one dataset.
    """
    counts: Counter[tuple[bool, bool]] = Counter()
    for batch in dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        there = (batch[column].combine_chunks().value_lengths().to_pylist() for column in ID_COLUMNS[1:])
        counts.update((bool(chosen), bool(rejected)) for chosen, rejected in zip(*there, strict=True))
    pairs, desirable, undesirable = (counts[key] for key in ((True, True), (True, False), (False, True)))
    if counts[False, False] or (pairs and desirable + undesirable):
        raise UserError(
            f"{name} dataset holds {pairs:,} pairs, {desirable + undesirable:,} rows with one response and "
            f"{counts[False, False]:,} with none; give pairs, or rows with one response each"
        )
    return (desirable, undesirable) if desirable + undesirable else None


def _refuse_unpaired(objective: Mixture | None, name: str, unpaired: bool) -> None:
    if unpaired and objective is not None and (why := objective.needs_pairs):
        raise UserError(
            f"objective {objective.name}: {why}, and the {name} dataset has unpaired rows "
            f"({', '.join(UNPAIRED_COLUMNS)}); take kto or apo_zero_unpaired, alone or with sft, or give pairs"
        )


def _check_labels(dataset: Dataset, name: str) -> None:
    """Labels are true or false. Not 1 and 0: elsewhere those are scores, or -1 is the other one."""
    if columns_of(dataset) != UNPAIRED_COLUMNS:
        return
    for row, label in enumerate(dataset["label"][:]):
        if not isinstance(label, bool):
            raise UserError(f"label of row {row} of the {name} dataset is {label!r}; true (desirable) or false needed")


def _balance(counts: tuple[int, int] | None, objective: Mixture) -> list[str]:
    """What to tell about the numbers of desirable and undesirable rows: nothing from 3:4 to 4:3, weighted."""
    if counts is None:
        return []
    desirable, undesirable = counts
    if not undesirable:
        return ["train: every row is desirable; they all go up, and nothing says what to avoid"]
    if not desirable:
        return ["train: every row is undesirable; the model learns what not to say, and not what to say instead"]
    up, down = objective.class_weights
    ratio = up * desirable / (down * undesirable)
    if 3 / 4 <= ratio <= 4 / 3:
        return []
    return [
        f"train: {desirable:,} desirable and {undesirable:,} undesirable rows pull {ratio:.2g} to 1; desirable_weight "
        f"{up / ratio:.2g} or undesirable_weight {down * ratio:.2g} of the objective would even that out"
    ]


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
    prompt, *whole = _render(example, tokenizer)
    start = min(_common_prefix(prompt, ids) for ids in whole)
    responses = [_until_end(ids[start:], set(ends), tokenizer) for ids in whole]
    chosen, rejected = (*responses, []) if len(responses) == 1 else responses
    if len(responses) == 1 and not example["label"]:
        chosen, rejected = rejected, chosen
    return {
        "prompt_ids": prompt[:start],
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "_verdict": _verdict(prompt[:start], responses, set(ends), tokenizer.bos_token_id, max_length),
        "_prompt_parts": start < len(prompt),
    }


def _render(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], ...]:
    """Ids of the prompt alone and of the prompt with each answer."""
    prompt = example["prompt"]
    answers = [example[column] for column in (("chosen", "rejected") if "chosen" in example else ("completion",))]
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        whole = [prompt + (answer if answer.endswith(end) else answer + end) for answer in answers]
        return tuple(tokenizer(text)["input_ids"] for text in (prompt, *whole))
    options = {**(example.get("chat_template_kwargs") or {}), "tools": example.get("tools")}

    def ids(messages: list[dict[str, Any]], **more: Any) -> list[int]:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more, **options)["input_ids"]

    return ids(prompt, add_generation_prompt=True), *(ids(prompt + answer) for answer in answers)


def _until_end(ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` up to their last end of turn, where only white space follows it; `ids` as they are otherwise."""
    last = max((place for place, token in enumerate(ids) if token in ends), default=None)
    if last is None or last == len(ids) - 1 or tokenizer.decode(ids[last + 1 :]).strip():
        return ids
    return ids[: last + 1]


def _verdict(
    prompt: list[int], responses: list[list[int]], ends: set[int], bos: int | None, max_length: int | None
) -> str:
    """What is wrong with a tokenised row: a key of `_FAULTS`, "too_long", or nothing."""
    if len(responses) == 2 and responses[0] == responses[1]:
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
