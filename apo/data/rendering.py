"""A row as token ids: what its chat template makes of it, which tokens the model says, what the template leaves out.

Only assistant turns are trained. A turn starts where the prompt before it and the whole conversation part, and ends
with its end of turn; turns of users and tools within an answer are context. Texts are encoded as text: `<|im_end|>`
inside a message is no control token. Every text of a row must be in what was rendered, or it is reported.

Rows come as clair's `read_row` gives them: all text, or messages with content and standard roles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which its thoughts come."""
NOTES = {
    "parted": "the chat template renders the prompt alone otherwise than before an answer in {rows}; the answer is "
    "trained from where the two part",
    "tools": "the chat template leaves out `tools`, or parts of them, in {rows}",
    "prompt_text": "the chat template leaves out text of the prompt in {rows}",
    "prompt_calls": "the chat template leaves out tool calls of the prompt, or parts of them, in {rows}",
    "prompt_thoughts": "the chat template leaves out thoughts of the prompt's turns in {rows}",
    "text": "the chat template leaves out text beside tool calls of an answer in {rows}; it is not trained",
    "thoughts": "the chat template leaves out thoughts of an answer in {rows}; they are not trained",
    "keys": "the chat template leaves out other keys of messages, with text, in {rows}: {names}",
    "empty": "an answer has no text in {rows}; the end of turn alone is trained",
    "inner_end": "the chat template ends turns within an answer otherwise than the last one in {rows}; those ends are "
    "not trained",
    "no_end": "the chat template writes no end of turn after an answer in {rows}; the token that ends it is added",
    "marks": "{rows} hold the text of a control token, which is encoded as text",
    "after_end": "the chat template goes on after the end of turn in {rows}, as with a line break; the model does not "
    "say that, and it is not trained (TRL trains it too)",
    "begun": "the prompt ends in an assistant turn in {rows}; the answer goes on with that turn",
}
"""What the user should know of rows, by the keys of `Rendered.notes`. `keys` comes once for each key: `keys:name`."""

_LOOKED_AT = ("role", "content", "tool_calls", *THOUGHTS)
_OF_THE_ROW = ("score", "rating", "rationale")
_END_THOUGHT = re.compile(r"</think>|\[/THINK\]")
_START_THOUGHT = re.compile(r"<think>|\[THINK\]")
_RENDERED = re.compile(
    r"\s*(<s>\s*|<bos>\s*|<\|begin_of_text\|>\s*)?(<\|im_start\|>\s*(system|user|assistant)\b"
    r"|<\|start_header_id\|>\s*(system|user|assistant)\b|<start_of_turn>\s*(user|model)\b"
    r"|<\|start\|>\s*(system|developer|user|assistant)\b|\[INST\](?=.*\[/INST\])|<\|(system|user|assistant)\|>"
    r"|<｜(begin▁of▁sentence|User|Assistant)｜>|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<\|header_start\|>"
    r"|\[gMASK\]|<extra_id_[01]>\s*(System|User|Assistant)\b)",
    re.DOTALL,
)
"""How a text begins that a template of ChatML, Llama, Gemma, Harmony, Mistral, Phi, DeepSeek, Granite, Command, GLM or
Nemotron has already been applied to."""
_TRIES = 3
"""How often a row is rendered whose template writes another time when it is asked again."""
_HEAD = 60
"""Letters at the beginning of a text in which a template's marks would stand."""
_BLANKS = re.compile(r"\s+|\\[nrt]|\\(?=[\"'\\/])")


def _rendered_already(number: int, column: str, mark: str) -> str:
    return (
        f"message {number} of {column!r} begins with {mark.strip()!r}: a chat template has already been applied to it; "
        "give messages, or the text alone"
    )


class RowFault(UserError):
    """What is wrong with one row, without its number."""


class _Ticked(Exception):
    """The template's clock has ticked while a row was rendered, so that its prompt is another one each time."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of one row. `masks` has a 1 for each trained token of an answer, or nothing where all are trained."""

    prompt: list[int]
    answers: list[list[int]]
    masks: list[list[int]]
    notes: set[str] = field(default_factory=set)


def control_tokens(tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> list[str]:
    """Texts of the tokens that only a template may write: special ones and ends of turns. Marks of thoughts, which are
    part of an answer's text, are not among them."""
    tokens = tokenizer.added_tokens_decoder.items()
    texts = [token.content for id, token in tokens if token.special or id in ends]
    return [text for text in texts if text.strip() and "think" not in text.lower()]


def writes_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template can write the date or the time (`strftime_now`)."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def render(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, ends: set[int], control: list[str],
    day: str | None = None,
) -> Rendered:  # fmt: skip
    """The ids of a row's prompt and of its one or two answers.

    `day` is the date (YYYY-MM-DD) that a chat template writes as today's; None is the date of the clock.

    Raises RowFault for turns that are no answer, texts that are rendered already, tool calls and answers that the
    template leaves out, and whatever the template or the tokenizer raises.
    """
    columns = ("chosen", "rejected") if "chosen" in row else ("completion",)
    if isinstance(row["prompt"], str):
        return _render_text(row, columns, tokenizer, ends, control)
    for _ in range(_TRIES):
        with suppress(_Ticked):
            return _Conversation(row, columns, tokenizer, ends, control, day).rendered()
    raise RowFault("the chat template writes the time, and another one each time; take a template that writes the day")


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens, or letters, two sequences begin with in common."""
    if one == other[: len(one)]:
        return len(one)
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def no_end_message(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to say of an answer without an end of turn."""
    return (
        "an answer does not end with the end of turn, so the model would never learn to stop; make the chat template "
        f"end an answer with eos_token ({tokenizer.eos_token}) or name its end in generation_config.eos_token_id"
    )


# ---- rows of text


def _render_text(
    row: Mapping[str, Any], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, ends: set[int],
    control: Sequence[str],
) -> Rendered:  # fmt: skip
    """A row of plain text, which gets the end of sequence and no template.

    Control tokens are taken as such where the prompt has some, since a template has then been applied to the row; else
    they are text, but for an end of turn at an answer's end.
    """
    prompt, answers = row["prompt"], [row[column] for column in columns]
    endings = [mark for end in sorted(ends) if (mark := tokenizer.decode([end]))]
    parts = []
    for column, text in zip(columns, answers, strict=True):
        ending = next((mark for mark in endings if text.rstrip().endswith(mark)), None)
        body = text if ending is None else text.rstrip().removesuffix(ending)
        if body.rstrip().endswith(tuple(endings)):
            raise RowFault(f"an answer ends with the end of turn twice: {column!r}; take one out")
        parts.append((body, ending or tokenizer.eos_token))
    has_marks = any(mark in body for body, _ in parts for mark in control) and not any(
        mark in prompt for mark in control
    )
    if has_marks:
        from transformers.utils.chat_template_utils import mark_control_tokens

        parts = [(mark_control_tokens(body, _any_of(control)), ending) for body, ending in parts]
    texts = [prompt, *(prompt + body + ending for body, ending in parts)]
    first, *ids = ((_encode_marked if has_marks else _encode_text)(tokenizer, text) for text in texts)
    start = min(common_prefix(first, one) for one in ids)
    responses = [one[start:] for one in ids]
    for column, response in zip(columns, responses, strict=True):
        inner = next((token for token in response[:-1] if token in ends), None)
        if inner is not None:
            mark = tokenizer.decode([inner])
            raise RowFault(f"{column!r} goes on after the end of turn {mark}; take the mark out, or give messages")
    if not start:
        raise RowFault(
            "no token of the prompt is left, since the tokenizer writes its end and the beginning of an answer as one "
            f"({tokenizer.decode(ids[0][:1])!r}); begin the answers with a space or a line break, or give messages"
        )
    notes = {"parted"} if start < len(first) else set()
    notes |= {"empty"} if not all(body.strip() for body, _ in parts) else set()
    return Rendered(first[:start], responses, [], notes | ({"marks"} if has_marks else set()))


def _any_of(control: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))


def _encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Ids of a text in which transformers' `mark_control_tokens` has marked what is no control token."""
    from transformers.utils.chat_template_utils import encode_marked_chat

    begin = [] if options else [token for token in _encode_text(tokenizer, "") if token == tokenizer.bos_token_id]
    try:
        return begin + encode_marked_chat(tokenizer, text)
    except Exception as error:
        raise RowFault(f"the text of a control token cannot be encoded as text: {one_line(error)}") from error


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # of the tokenizer: whatever it is, the row's number belongs to it
        raise RowFault(f"the tokenizer cannot encode {one_line(text, 40)!r}: {one_line(error)}") from error


# ---- rows of messages

Messages = list[dict[str, Any]]


class _Conversation:
    """A row of messages."""

    def __init__(
        self, row: Mapping[str, Any], columns: Sequence[str], tokenizer: Any, ends: set[int], control: Sequence[str],
        day: str | None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.ends, self.columns, self.notes = tokenizer, ends, columns, set()
        self.tools, self.options = row.get("tools"), row.get("chat_template_kwargs") or {}
        self.day = date.fromisoformat(day) if day and writes_time(tokenizer) else None
        self.prompt, *self.answers = (row[column] for column in ("prompt", *columns))
        self._check_not_rendered()
        self.begun = self.prompt[-1]["role"] == "assistant" and not self.prompt[-1].get("tool_calls")
        if self.begun:
            self.notes.add("begun")
        texts = [*_texts(self.tools), *_texts(self.prompt), *(text for one in self.answers for text in _texts(one))]
        self.marks = None
        if any(mark in text for text in texts for mark in control):
            self.marks = _any_of(control)
            self.notes.add("marks")
        if any(message.get("tool_calls") for part in (self.prompt, *self.answers) for message in part):
            self._settle_calls()

    def _check_not_rendered(self) -> None:
        """Raise RowFault for a text that has a template's marks around it: the template would write them again."""
        tokens = (self.tokenizer.convert_ids_to_tokens(end) for end in sorted(self.ends))
        ends = tuple(token for token in tokens if token)
        for column, messages in zip(("prompt", *self.columns), (self.prompt, *self.answers), strict=True):
            for number, message in enumerate(messages, 1):
                if mark := _RENDERED.match(message["content"]):
                    raise RowFault(_rendered_already(number, column, mark.group()))
            if column != "prompt" and messages[-1]["content"].rstrip().endswith(ends):
                raise RowFault(
                    f"an answer ends with the end of turn twice: the text of {column!r} ends with it; take it out of "
                    "the text, the chat template writes it"
                )

    def _check_own_marks(self, texts: Sequence[str]) -> None:
        """Raise RowFault for a text that begins as this template itself begins a turn."""
        columns = ("prompt", *self.columns)
        for column, messages, text in zip(columns, (self.prompt, *self.answers), (texts[0], *texts), strict=True):
            for number, message in enumerate(messages, 1):
                head = message["content"].strip()[:_HEAD]
                before = text.partition(head)[0].rstrip() if head else ""
                for part in (head[:length].rstrip() for length in range(len(head), 0, -1)):
                    if before.endswith(part) and self.marks.search(part):
                        raise RowFault(_rendered_already(number, column, part))

    def _settle_calls(self) -> None:
        """Give arguments of tool calls as objects, or as JSON text where the template takes no objects (DeepSeek)."""
        objects = self.prompt, *self.answers
        try:
            self._render(self.wholes[0])
        except RowFault as fault:
            self.prompt, *self.answers = ([_with_json_arguments(message) for message in part] for part in objects)
            try:
                self._render(self.wholes[0])
            except RowFault:
                raise fault from None

    @property
    def wholes(self) -> list[Messages]:
        """The conversations. A begun turn at the end of the prompt and the answer's first turn are one."""
        if not self.begun:
            return [[*self.prompt, *answer] for answer in self.answers]
        *before, begun = self.prompt
        joined = [{**begun, **first, "content": begun["content"] + first["content"]} for first, *_ in self.answers]
        return [[*before, turn, *answer[1:]] for turn, answer in zip(joined, self.answers, strict=True)]

    # rendering

    def _render(self, messages: Messages, **more: Any) -> tuple[str, list[int]]:
        """What the template makes of messages: the text, and its ids."""
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils as theirs

        if getattr(self.tokenizer, "chat_template", "") is None:
            raise RowFault("messages need a chat template, and the tokenizer has none; give it one, or rows of text")
        tools, options = self.tools, {**self.options, **more}
        if self.marks:
            messages, tools = (theirs.mark_control_tokens(part, self.marks) for part in (messages, tools))
        apply = self.tokenizer.apply_chat_template
        try:
            if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
                # A tokenizer that is no Jinja template, such as Mistral's own, writes control tokens as ids alone.
                ids = apply(messages, tokenize=True, return_dict=True, tools=tools, **options)["input_ids"]
                return self.tokenizer.decode(ids), ids
            with _dated(self.tokenizer.get_chat_template(tools=tools), self.day) if self.day else nullcontext():
                text = apply(messages, tokenize=False, tools=tools, **options)
        except Exception as error:  # of the template or its sandbox: whatever it is, the row's number belongs to it
            turns = ", ".join(message["role"] for message in messages)
            words = one_line(error) if str(error) else type(error).__name__
            raise RowFault(
                f"the chat template does not take the turns {turns}: {words}; change the row, or the template"
            ) from error
        if not self.marks:
            return text, _encode_text(self.tokenizer, text, add_special_tokens=False)
        ids = _encode_marked(self.tokenizer, text, add_special_tokens=False)
        marked = theirs.mark_control_tokens(".", re.compile(r"\."))
        return text.replace(marked[0], "").replace(marked[-1], ""), ids

    def rendered(self) -> Rendered:
        """The row's ids, checked."""
        asked = {"continue_final_message": True} if self.begun else {"add_generation_prompt": True}
        prompt_text, prompt = self._render(self.prompt, **asked)
        texts, wholes = zip(*(self._render(whole) for whole in self.wholes), strict=True)
        if writes_time(self.tokenizer) and self._render(self.prompt, **asked)[0] != prompt_text:
            raise _Ticked
        if self.marks:
            self._check_own_marks(texts)
        start = min(common_prefix(prompt, ids) for ids in wholes)
        if start < len(prompt):
            self.notes.add("parted")
        found = [
            self._answer(whole, ids, len(answer), start)
            for whole, ids, answer in zip(self.wholes, wholes, self.answers, strict=True)
        ]
        self._check_lost(prompt_text, texts)
        masks = [mask for _, mask in found] if any(mask for _, mask in found) else []
        return Rendered(prompt[:start], [ids for ids, _ in found], masks, self.notes)

    def _answer(self, whole: Messages, ids: list[int], turns: int, start: int) -> tuple[list[int], list[int]]:
        """The ids of an answer of so many turns, and its mask, which is empty where all of it is trained."""
        first = len(whole) - turns
        said = [index for index in range(first, len(whole)) if whole[index]["role"] == "assistant"]
        starts = [start]
        if said[1:] and not self.begun:
            self._start_of_turn(whole, first, ids, -1)
        for index in said[1:]:
            starts.append(self._start_of_turn(whole, index, ids, starts[-1]))
        spans = []
        for index, (begin, after) in zip(said, pairwise(starts), strict=False):  # the last one's end is another matter
            spans.append((begin, self._inner_end(whole, index, ids, begin, after)))
        ids, end = self._final_end(whole, ids, starts[-1])
        if not spans:
            return ids[start:end], []
        mask = [0] * (end - start)
        for begin, after in [*spans, (starts[-1], end)]:
            mask[begin - start : after - start] = [1] * (after - begin)
        return ids[start:end], mask

    def _start_of_turn(self, whole: Messages, index: int, ids: list[int], after: int) -> int:
        """Where a later assistant turn of an answer begins in the ids."""
        prompted, alone = (self._render(whole[:index], add_generation_prompt=asked)[1] for asked in (True, False))
        start = common_prefix(prompted, ids)
        if start <= after or start < common_prefix(prompted, alone):
            raise RowFault(
                f"the chat template writes what is before turn {index} of the conversation otherwise when more follow, "
                "so it cannot be told which tokens are the model's; give a row for each assistant turn"
            )
        return start

    def _inner_end(self, whole: Messages, index: int, ids: list[int], start: int, after: int) -> int:
        """Where a turn that others follow ends: with its end of turn, or before what the template writes instead."""
        following = whole[index + 1]
        if following["role"] != "assistant":  # no end of that turn is this one's: look before its text
            other = {**following, "content": "," if following["content"].startswith(".") else "."}
            after = min(after, common_prefix(self._render([*whole[: index + 1], other])[1], ids))
        end = next((place for place in range(start, after) if ids[place] in self.ends), None)
        if end is not None:
            return end + 1
        end = min(after, common_prefix(self._render(whole[: index + 1])[1], ids))
        if end <= start:
            raise RowFault(no_end_message(self.tokenizer))
        self.notes.add("inner_end")
        return end

    def _final_end(self, whole: Messages, ids: list[int], start: int) -> tuple[list[int], int]:
        """The ids, and where the last turn ends in them, its end of turn included."""
        end, last = None, None
        for index in range(len(ids) - 1, start - 1, -1):
            if ids[index] in self.ends:
                end = index  # the first of several: Phi's template writes the end of the text after the end of turn
            elif self.tokenizer.decode(ids[index]).strip():
                last = self.tokenizer.added_tokens_decoder.get(ids[index])
                break
        if end is not None:
            if end + 1 < len(ids):
                self.notes.add("after_end")
            return ids, end + 1
        if last is not None and last.special:
            raise RowFault(no_end_message(self.tokenizer))
        self.notes.add("no_end")
        return [*ids, self._next_token(whole[-1])], len(ids) + 1

    def _next_token(self, turn: Mapping[str, Any]) -> int:
        """What ends a turn that has no end: the beginning of the next one, if generation stops there."""
        calls = {"tool_calls": turn["tool_calls"]} if "tool_calls" in turn else {}
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": ".", **calls}]
        followed = [*before, {"role": "tool" if calls else "user", "content": "."}]
        ids, more = (self._render(messages)[1] for messages in (before, followed))
        same = common_prefix(ids, more)
        if same == len(ids) < len(more) and more[same] in self.ends:
            return more[same]
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self.ends)

    # what was left out

    def _check_lost(self, prompt_text: str, texts: Sequence[str]) -> None:
        """Note, or raise RowFault for, texts of the row that are not in what was rendered."""
        if not _are_in(texts[0], _tool_texts(self.tools)):
            self.notes.add("tools")
        for messages, text in zip((self.prompt, *self.answers), (texts[0], *texts), strict=True):
            others = ((key, value) for message in messages for key, value in message.items() if _is_said(key))
            self.notes |= {f"keys:{key}" for key, value in others if not _are_in(text, [*_texts(value)])}
        for message in self.prompt:
            thoughts, said = _split_thoughts(message)
            for key, pieces in (("thoughts", thoughts), ("text", [said]), ("calls", _calls(message))):
                if not _are_in(texts[0], pieces):
                    self.notes.add(f"prompt_{key}")
        for column, answer, text in zip(self.columns, self.answers, texts, strict=True):
            if not any(message["content"].strip() or message.get("tool_calls") for message in answer):
                self.notes.add("empty")
            for message in answer:
                self._check_lost_of(message, column, prompt_text, text)

    def _check_lost_of(self, message: Mapping[str, Any], column: str, prompt_text: str, text: str) -> None:
        def is_written(pieces: Sequence[str]) -> bool:
            # The generation prompt may hold the beginning of an answer, such as <think>, or a letter of it.
            return _are_in(text[common_prefix(prompt_text, text) :], pieces) or _are_in(
                text[common_prefix(self._prompt_alone, text) :], pieces
            )

        thoughts, said = _split_thoughts(message)
        calls = _calls(message)
        if not is_written(calls):
            raise RowFault(
                f"the chat template leaves out a tool call of {column!r}, or a part of it ({', '.join(calls)}), so "
                "another answer would be trained; take a template that writes tool calls, or take the row out"
            )
        if not is_written([said]):
            if not calls:
                raise RowFault(
                    f"the chat template leaves out text of {column!r}: {one_line(said, 60)!r} is not in the text; "
                    "change the template, or take the row out"
                )
            self.notes.add("text")
        if not is_written(thoughts):
            self.notes.add("thoughts")

    @cached_property
    def _prompt_alone(self) -> str:
        """The prompt without the beginning of an answer."""
        return self._render(self.prompt)[0]


@contextmanager
def _dated(template: str, day: date) -> Iterator[None]:
    """Let a chat template's `strftime_now` write `day`.

    It is a global function of the compiled template, which transformers caches; no variable can shadow it, since
    transformers passes functions on as text.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = _compile_jinja_template(template).globals
    names["strftime_now"] = partial(_strftime_on, day)
    try:
        yield
    finally:
        del names["strftime_now"]


def _strftime_on(day: date, format: str) -> str:
    """What a template's `strftime_now(format)` writes on `day`. A format with a time of day takes that of the clock."""
    midnight, later = (datetime.combine(day, moment) for moment in (time.min, time(13, 14, 15, 161718)))
    text = midnight.strftime(format)
    return text if later.strftime(format) == text else datetime.now().strftime(format)


def _texts(value: Any) -> Iterator[str]:
    """Every text in messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _is_said(key: str) -> bool:
    """True for a key of a message that is none of those looked at by themselves, and no id or score of it."""
    return key not in _LOOKED_AT and not key.endswith("id") and not any(word in key for word in _OF_THE_ROW)


def _tool_texts(value: Any) -> list[str]:
    """Names and descriptions of tools and of their parameters; a template may write types in its own words."""
    if isinstance(value, list | tuple):
        return [text for item in value for text in _tool_texts(item)]
    if not isinstance(value, Mapping):
        return []
    found = [item for key in ("name", "description") if isinstance(item := value.get(key), str)]
    properties = value.get("properties")
    if isinstance(properties, Mapping):
        found += properties
    return found + [text for item in value.values() for text in _tool_texts(item)]


def _functions(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls") or []
    return [call.get("function", call) for call in calls if isinstance(call, Mapping)]


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text."""

    def written(function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**function, "arguments": text}

    calls = [
        {**call, "function": written(call["function"])} if "function" in call else written(call)
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _calls(message: Mapping[str, Any]) -> list[str]:
    """Names and arguments of a message's tool calls, as the texts they must be found by."""
    found = []
    for function in _functions(message):
        arguments = function.get("arguments")
        with suppress(ValueError):  # text that is no JSON is looked for as it is
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        found += [function["name"], *_values(arguments)]
    return found


def _values(value: Any) -> list[str]:
    """Keys and values of a tool call's arguments as text."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *_values(item))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _values(item)]
    return [value] if isinstance(value, str) else [json.dumps(value)] if type(value) in (int, float) else []


def _split_thoughts(message: Mapping[str, Any]) -> tuple[list[str], str]:
    """The thoughts of a message, under keys of their own or in its text, and the rest of its text."""
    thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
    content = message["content"]
    if message["role"] == "assistant" and (marks := [*_END_THOUGHT.finditer(content)]):
        thoughts.append(_START_THOUGHT.sub("", content[: marks[-1].start()]))
        content = content[marks[-1].end() :]
    return thoughts, content


def _are_in(text: str, pieces: Sequence[str]) -> bool:
    """Whether all pieces are in a rendered text: as they are, trimmed, or as JSON writes them."""
    squeezed = None
    for piece in pieces:
        piece = piece.strip()
        if piece in text:
            continue
        if squeezed is None:
            squeezed = _BLANKS.sub("", text)
        forms = (piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1], _as_html(piece))
        if not any(_BLANKS.sub("", form) in squeezed for form in forms):
            return False
    return True


def _as_html(text: str) -> str:
    """As Jinja's own `tojson` writes it."""
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "'": "\\u0027"}
    return "".join(escapes.get(letter, letter) for letter in json.dumps(text)[1:-1])
