"""Render a row to token ids: apply its chat template, find the trained tokens, and check what the template leaves out.

Only assistant turns are trained. A turn starts where the prompt before it and the whole conversation diverge, and ends
with its end of turn; turns of users and tools within an answer are context. Texts are encoded as text: `<|im_end|>`
inside a message is no control token. Each text of a row that the rendered text lacks is reported.

Rows have the form of clair's `read_row`: all text, or messages with content and standard roles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from apo.data.applied_templates import check_not_rendered, check_opening_marks
from apo.data.encoding import Rendered, RowError, any_of, common_prefix, encode_marked, encode_text, no_end_message
from apo.data.message_texts import (
    call_texts,
    contains_all,
    each_text,
    is_extra_text,
    split_thoughts,
    tool_texts,
    with_json_arguments,
    with_thoughts_in_text,
)
from apo.data.template_time import write_day, writes_time
from apo.data.text_rows import render_text
from clair.core.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTES = {
    "parted": "the chat template renders the prompt alone differently than before an answer in {rows}; the answer is "
    "trained from where the two diverge",
    "tools": "the chat template leaves out `tools`, or parts of them, in {rows}",
    "prompt_text": "the chat template leaves out text of the prompt in {rows}",
    "prompt_calls": "the chat template leaves out tool calls of the prompt, or parts of them, in {rows}",
    "prompt_thoughts": "the chat template leaves out thoughts of the prompt's turns in {rows}",
    "text": "the chat template leaves out text beside tool calls of an answer in {rows}; it is not trained",
    "thoughts": "the chat template leaves out thoughts of an answer in {rows}; they are not trained",
    "keys": "the chat template leaves out other keys of messages, with text, in {rows}: {names}",
    "empty": "an answer has no text in {rows}; the end of turn alone is trained",
    "inner_end": "the chat template ends turns within an answer differently than the last one in {rows}; those ends "
    "are not trained",
    "no_end": "the chat template writes no end of turn after an answer in {rows}; the token that ends it is added",
    "marks": "{rows} hold the text of a control token, which is encoded as text",
    "after_end": "the chat template continues after the end of turn in {rows}, for example with a line break; the "
    "model does not write that, and it is not trained (TRL trains it too)",
    "begun": "the prompt ends in an assistant turn in {rows}; the answer continues that turn",
}
"""Notes for the user, by the keys of `Rendered.notes`. `keys` occurs once per key of a message: `keys:name`."""

_MAX_ATTEMPTS = 3
"""How often a row is rendered if its template writes a different time on each rendering."""


class _TimeChanged(Exception):
    """The template wrote a different time in two renderings of the same prompt."""


def render(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    eos: set[int],
    control: list[str],
    day: str | None = None,
) -> Rendered:
    """The ids of the prompt of a row and of its one or two answers.

    `day` is the date (YYYY-MM-DD) that a chat template writes as today's; None is the date of the clock.

    Raises RowError for turns that are no answer, texts that are rendered already, tool calls and answers that the
    template leaves out, and any error of template or tokenizer.
    """
    columns = ("chosen", "rejected") if "chosen" in row else ("completion",)
    if isinstance(row["prompt"], str):
        return render_text(row, columns, tokenizer, eos, control)
    for _ in range(_MAX_ATTEMPTS):
        with suppress(_TimeChanged):
            return _Conversation(row, columns, tokenizer, eos, control, day).rendered()
    raise RowError(
        "the chat template writes a time that changes with each rendering; take a template that writes the day"
    )


# ---- rows of messages

Messages = list[dict[str, Any]]


class _Conversation:
    """A row of messages, with the tokenizer that renders it."""

    def __init__(
        self,
        row: Mapping[str, Any],
        columns: Sequence[str],
        tokenizer: Any,
        eos: set[int],
        control: Sequence[str],
        day: str | None,
    ) -> None:
        self.tokenizer, self.eos, self.columns, self.notes = tokenizer, eos, columns, set()
        self.tools, self.options = row.get("tools"), row.get("chat_template_kwargs") or {}
        self.day = date.fromisoformat(day) if day and writes_time(tokenizer) else None
        self.prompt, *self.answers = (row[column] for column in ("prompt", *columns))
        tokens = (tokenizer.convert_ids_to_tokens(end) for end in sorted(eos))
        check_not_rendered(self._messages_by_column, tuple(token for token in tokens if token))
        self.begun = self.prompt[-1]["role"] == "assistant" and not self.prompt[-1].get("tool_calls")
        if self.begun:
            self.notes.add("begun")
        self.marks: re.Pattern[str] | None = None
        if any(mark in text for text in each_text([self.tools, self.prompt, self.answers]) for mark in control):
            self.marks = any_of(control)
            self.notes.add("marks")
        if any(message.get("tool_calls") for messages in (self.prompt, *self.answers) for message in messages):
            self._convert_tool_calls()
        if any(split_thoughts(message)[0] for answer in self.answers for message in answer):
            self._convert_thoughts()

    def _convert_tool_calls(self) -> None:
        """Pass arguments of tool calls as objects, or as JSON text if the template rejects objects (DeepSeek)."""
        objects = self.prompt, *self.answers
        try:
            self._render(self.conversations[0])
        except RowError as fault:
            self.prompt, *self.answers = (
                [with_json_arguments(message) for message in messages] for messages in objects
            )
            try:
                self._render(self.conversations[0])
            except RowError:
                raise fault from None

    def _convert_thoughts(self) -> None:
        """Pass thoughts within the text of their turn, if the template writes them there alone (SmolLM3)."""
        if "<think>" not in str(self.tokenizer.chat_template):
            return
        answers = self.answers
        thoughts = [[t for message in answer for t in split_thoughts(message)[0]] for answer in answers]

        def are_written() -> bool:
            texts = [self._render(messages)[0] for messages in self.conversations]
            return all(contains_all(text, pieces) for text, pieces in zip(texts, thoughts, strict=True))

        if not are_written():
            self.answers = [[with_thoughts_in_text(message) for message in answer] for answer in answers]
            if not are_written():
                self.answers = answers

    @property
    def _messages_by_column(self) -> dict[str, Messages]:
        return dict(zip(("prompt", *self.columns), (self.prompt, *self.answers), strict=True))

    @property
    def conversations(self) -> list[Messages]:
        """The prompt with each answer. A begun turn at the end of the prompt is joined with the answer's first turn."""
        if not self.begun:
            return [[*self.prompt, *answer] for answer in self.answers]
        *earlier, begun = self.prompt
        joined = [{**begun, **first, "content": begun["content"] + first["content"]} for first, *_ in self.answers]
        return [[*earlier, turn, *answer[1:]] for turn, answer in zip(joined, self.answers, strict=True)]

    # rendering

    def _render(self, messages: Messages, **more: Any) -> tuple[str, list[int]]:
        """Messages rendered by the template: the text, and its ids."""
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils as theirs

        if getattr(self.tokenizer, "chat_template", "") is None:
            raise RowError("messages need a chat template, and the tokenizer has none; give it one, or rows of text")
        tools, options = self.tools, {**self.options, **more}
        if self.marks:
            messages, tools = (theirs.mark_control_tokens(value, self.marks) for value in (messages, tools))
        apply = self.tokenizer.apply_chat_template
        try:
            if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
                # A tokenizer without a Jinja template, such as Mistral's, writes control tokens as ids only.
                ids = apply(messages, tokenize=True, return_dict=True, tools=tools, **options)["input_ids"]
                return self.tokenizer.decode(ids), ids
            with write_day(self.tokenizer.get_chat_template(tools=tools), self.day) if self.day else nullcontext():
                text = apply(messages, tokenize=False, tools=tools, **options)
        except Exception as error:  # templates raise anything, and the row's number has to be added
            turns = ", ".join(message["role"] for message in messages)
            reason = one_line(error) if str(error) else type(error).__name__
            raise RowError(
                f"the chat template does not take the turns {turns}: {reason}; change the row, or the template"
            ) from error
        if not self.marks:
            return text, encode_text(self.tokenizer, text, add_special_tokens=False)
        ids = encode_marked(self.tokenizer, text, add_special_tokens=False)
        marked = theirs.mark_control_tokens(".", re.compile(r"\."))
        return text.replace(marked[0], "").replace(marked[-1], ""), ids

    def rendered(self) -> Rendered:
        """The ids of the row, checked."""
        ending = {"continue_final_message": True} if self.begun else {"add_generation_prompt": True}
        prompt_text, prompt = self._render(self.prompt, **ending)
        texts, conversation_ids = zip(*(self._render(messages) for messages in self.conversations), strict=True)
        if writes_time(self.tokenizer) and self._render(self.prompt, **ending)[0] != prompt_text:
            raise _TimeChanged
        if self.marks:
            check_opening_marks(self._messages_by_column, texts, self.marks)
        start = min(common_prefix(prompt, ids) for ids in conversation_ids)
        if start < len(prompt):
            self.notes.add("parted")
        answers = [
            self._answer(messages, ids, len(answer), start)
            for messages, ids, answer in zip(self.conversations, conversation_ids, self.answers, strict=True)
        ]
        self._check_all_written(prompt_text, texts)
        masks = [mask for _, mask in answers] if any(mask for _, mask in answers) else []
        return Rendered(prompt[:start], [ids for ids, _ in answers], masks, self.notes)

    def _answer(self, messages: Messages, ids: list[int], turns: int, start: int) -> tuple[list[int], list[int]]:
        """The ids of an answer of `turns` turns, and its mask, which is empty if all of it is trained."""
        first = len(messages) - turns
        assistant_turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
        starts = [start]
        if assistant_turns[1:] and not self.begun:
            self._start_of_turn(messages, first, ids, -1)
        for index in assistant_turns[1:]:
            starts.append(self._start_of_turn(messages, index, ids, starts[-1]))
        spans = []
        for index, (begin, stop) in zip(
            assistant_turns, pairwise(starts), strict=False
        ):  # `_final_end` handles the last turn
            spans.append((begin, self._inner_end(messages, index, ids, begin, stop)))
        ids, end = self._final_end(messages, ids, starts[-1])
        if not spans:
            return ids[start:end], []
        mask = [0] * (end - start)
        for begin, stop in [*spans, (starts[-1], end)]:
            mask[begin - start : stop - start] = [1] * (stop - begin)
        return ids[start:end], mask

    def _start_of_turn(self, messages: Messages, index: int, ids: list[int], earliest: int) -> int:
        """The index in the ids at which a later assistant turn of an answer starts."""
        prompted, alone = (
            self._render(messages[:index], add_generation_prompt=with_prompt)[1] for with_prompt in (True, False)
        )
        start = common_prefix(prompted, ids)
        if start <= earliest or start < common_prefix(prompted, alone):
            raise RowError(
                f"the chat template writes the turns before turn {index} of the conversation differently when more "
                "follow, so the tokens of the model cannot be located; give a row for each assistant turn"
            )
        return start

    def _inner_end(self, messages: Messages, index: int, ids: list[int], start: int, limit: int) -> int:
        """The end of a turn that others follow: after its end of turn, or before what the template writes instead."""
        following = messages[index + 1]
        if following["role"] != "assistant":  # an end of turn in that turn is not this one's: search before its text
            variant = {**following, "content": "," if following["content"].startswith(".") else "."}
            limit = min(limit, common_prefix(self._render([*messages[: index + 1], variant])[1], ids))
        end = next((position for position in range(start, limit) if ids[position] in self.eos), None)
        if end is not None:
            return end + 1
        end = min(limit, common_prefix(self._render(messages[: index + 1])[1], ids))
        if end <= start:
            raise RowError(no_end_message(self.tokenizer))
        self.notes.add("inner_end")
        return end

    def _final_end(self, messages: Messages, ids: list[int], start: int) -> tuple[list[int], int]:
        """The ids, and the end of the last turn in them, with its end of turn."""
        end, last = None, None
        for index in range(len(ids) - 1, start - 1, -1):
            if ids[index] in self.eos:
                end = index  # the first of several: Phi's template writes the end of the text after the end of turn
            elif self.tokenizer.decode(ids[index]).strip():
                last = self.tokenizer.added_tokens_decoder.get(ids[index])
                break
        if end is not None:
            if end + 1 < len(ids):
                self.notes.add("after_end")
            return ids, end + 1
        if last is not None and last.special:
            raise RowError(no_end_message(self.tokenizer))
        self.notes.add("no_end")
        return [*ids, self._next_token(messages[-1])], len(ids) + 1

    def _next_token(self, turn: Mapping[str, Any]) -> int:
        """The token that ends a turn without an end: the start of the next turn, if generation stops there."""
        calls = {"tool_calls": turn["tool_calls"]} if "tool_calls" in turn else {}
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": ".", **calls}]
        followed = [*turns, {"role": "tool" if calls else "user", "content": "."}]
        ids, more = (self._render(messages)[1] for messages in (turns, followed))
        same = common_prefix(ids, more)
        if same == len(ids) < len(more) and more[same] in self.eos:
            return more[same]
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self.eos)

    # texts that the template leaves out

    def _check_all_written(self, prompt_text: str, texts: Sequence[str]) -> None:
        """Note texts of the row that the rendered text lacks. Raises RowError for those of an answer."""
        if not contains_all(texts[0], tool_texts(self.tools)):
            self.notes.add("tools")
        for messages, text in zip((self.prompt, *self.answers), (texts[0], *texts), strict=True):
            others = ((key, value) for message in messages for key, value in message.items() if is_extra_text(key))
            self.notes |= {f"keys:{key}" for key, value in others if not contains_all(text, [*each_text(value)])}
        for message in self.prompt:
            thoughts, content = split_thoughts(message)
            for key, pieces in (("thoughts", thoughts), ("text", [content]), ("calls", call_texts(message))):
                if not contains_all(texts[0], pieces):
                    self.notes.add(f"prompt_{key}")
        for column, answer, text in zip(self.columns, self.answers, texts, strict=True):
            if not any(message["content"].strip() or message.get("tool_calls") for message in answer):
                self.notes.add("empty")
            for message in answer:
                self._check_message_written(message, column, prompt_text, text)

    def _check_message_written(self, message: Mapping[str, Any], column: str, prompt_text: str, text: str) -> None:
        def is_written(pieces: Sequence[str]) -> bool:
            # The generation prompt may contain the start of an answer, such as <think>, or a character of it.
            return contains_all(text[common_prefix(prompt_text, text) :], pieces) or contains_all(
                text[common_prefix(self._prompt_alone, text) :], pieces
            )

        thoughts, content = split_thoughts(message)
        calls = call_texts(message)
        if not is_written(calls):
            raise RowError(
                f"the chat template leaves out a tool call of {column!r}, or a part of it ({', '.join(calls)}), so "
                "another answer would be trained; take a template that writes tool calls, or take the row out"
            )
        if not is_written([content]):
            if not calls:
                raise RowError(
                    f"the chat template leaves out text of {column!r}: {one_line(content, 60)!r} is not in the text; "
                    "change the template, or take the row out"
                )
            self.notes.add("text")
        if not is_written(thoughts):
            self.notes.add("thoughts")

    @cached_property
    def _prompt_alone(self) -> str:
        """The prompt without the start of an answer."""
        return self._render(self.prompt)[0]
