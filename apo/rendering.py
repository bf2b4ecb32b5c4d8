"""A row as token ids: what its chat template makes of it, which tokens the model says, what the template leaves out.

Only assistant turns are trained. A turn starts where the prompt before it and the whole conversation part, and ends
with its end of turn; turns of users and tools within an answer are context. Texts are encoded as text: `<|im_end|>`
inside a message is no control token. Every text of a row must be in what was rendered, or it is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from clair.recipe import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that any template may be given. Others must be in the template's own text, such as Llama's `ipython`."""
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
    "no_end": "the chat template writes no end of turn after an answer in {rows}; the token that ends it is added",
    "marks": "{rows} hold the text of a control token, which is encoded as text",
    "begun": "the prompt ends in an assistant turn in {rows}; the answer goes on with that turn",
}
"""What the user should know of rows, by the keys of `Rendered.notes`."""

_END_THOUGHT = re.compile(r"</think>|\[/THINK\]")
_START_THOUGHT = re.compile(r"<think>|\[THINK\]")
_RENDERED = re.compile(
    r"\s*(<s>\s*|<bos>\s*|<\|begin_of_text\|>\s*)?(<\|im_start\|>\s*(system|user|assistant)\b"
    r"|<\|start_header_id\|>\s*(system|user|assistant)\b|<start_of_turn>\s*(user|model)\b"
    r"|<\|start\|>\s*(system|developer|user|assistant)\b|\[INST\](?=.*\[/INST\])|<\|(system|user|assistant)\|>)",
    re.DOTALL,
)
"""How a text begins that ChatML, Llama, Gemma, Harmony, Mistral or Phi has already been applied to."""
_TAIL = 200
"""Letters at the end of a rendered prompt in which an answer may begin."""
_BLANKS = re.compile(r"\s+|\\[nrt]|\\(?=[\"'\\/])")


class RowFault(UserError):
    """What is wrong with one row, without its number."""


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


def render(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, ends: set[int], control: list[str]) -> Rendered:
    """The ids of a row's prompt and of its one or two answers.

    Raises RowFault for turns that are no answer, roles and fields that cannot be read, tool calls and answers that the
    template leaves out, and whatever the template or the tokenizer raises.
    """
    columns = ("chosen", "rejected") if "chosen" in row else ("completion",)
    for column in ("prompt", *columns):
        if not isinstance(row[column], str | list | tuple):
            raise RowFault(f"{column!r} is {_kind(row[column])}, neither text nor messages with role and content")
    texts = [column for column in ("prompt", *columns) if isinstance(row[column], str)]
    if len(texts) == 1 + len(columns):
        return _render_text(row, columns, tokenizer, ends)
    if texts:
        raise RowFault(f"{texts[0]!r} is text and another column is a list; give all as text or all as messages")
    return _Conversation(row, columns, tokenizer, ends, control).rendered()


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens, or letters, two sequences begin with in common."""
    if one == other[: len(one)]:
        return len(one)
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def without_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to say of an answer without an end of turn."""
    return (
        "an answer does not end with the end of turn, so the model would never learn to stop; make the chat template "
        f"end an answer with eos_token ({tokenizer.eos_token}) or name its end in generation_config.eos_token_id"
    )


# ---- rows of text


def _render_text(
    row: Mapping[str, Any], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, ends: set[int]
) -> Rendered:
    """A row of plain text, which gets the end of sequence and no template."""
    prompt, answers = row["prompt"], [row[column] for column in columns]
    for column in ("prompt", *columns):
        _check_whole(row[column], f"{column!r}")
    _check_no_json(prompt, answers)
    marks = tuple(mark for end in sorted(ends) if (mark := tokenizer.decode([end])))
    whole = [prompt + (text if text.rstrip().endswith(marks) else text + tokenizer.eos_token) for text in answers]
    first, *ids = (_encode_text(tokenizer, text) for text in (prompt, *whole))
    start = min(common_prefix(first, one) for one in ids)
    responses = []
    for column, one in zip(columns, ids, strict=True):
        response = one[start:]
        places = [place for place, token in enumerate(response) if token in ends]
        if places and tokenizer.decode([token for token in response[places[0] :] if token not in ends]).strip():
            mark = tokenizer.decode([response[places[0]]])
            raise RowFault(f"{column!r} goes on after the end of turn {mark}; take the mark out, or give messages")
        responses.append(response[: places[-1] + 1] if places else response)
    return Rendered(first[:start], responses, [], {"parted"} if start < len(first) else set())


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
        self, row: Mapping[str, Any], columns: Sequence[str], tokenizer: Any, ends: set[int], control: Sequence[str]
    ) -> None:
        self.tokenizer, self.ends, self.columns, self.notes = tokenizer, ends, columns, set()
        self.template = str(tokenizer.chat_template)
        self.options = without_nulls(row.get("chat_template_kwargs") or {})
        self.tools = _tools(row.get("tools"))
        self.prompt, *self.answers = (self._messages(row[column], column) for column in ("prompt", *columns))
        if not self.prompt:
            raise RowFault("'prompt' has no messages; give at least one turn before the answer")
        for column, answer in zip(columns, self.answers, strict=True):
            _check_answer(answer, column)
        alone = [answer[0].get("content") if len(answer) == 1 else None for answer in self.answers]
        _check_no_json(self.prompt[0].get("content") if len(self.prompt) == 1 else None, alone)
        self._check_not_rendered()
        self.begun = self.prompt[-1]["role"] == "assistant" and not self.prompt[-1].get("tool_calls")
        if self.begun:
            self.notes.add("begun")
        texts = [*_texts(self.tools), *_texts(self.prompt), *(text for one in self.answers for text in _texts(one))]
        self.marks = None
        if any(mark in text for text in texts for mark in control):
            self.marks = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
            self.notes.add("marks")
        if any(message.get("tool_calls") for part in (self.prompt, *self.answers) for message in part):
            self._settle_calls()

    def _messages(self, messages: Sequence[Any], column: str) -> Messages:
        return [self._message(message, f"turn {number} of {column!r}") for number, message in enumerate(messages)]

    def _message(self, message: Any, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowFault(f"{where} is {_kind(message)} without a role; messages with role and content are needed")
        message, role = without_nulls(message), message["role"]
        if role not in ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", self.template):
            raise RowFault(f"{where} has the role {role!r}, which is none of {', '.join(ROLES)}, nor of the template's")
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = message["content"] = _joined_parts(content, where)
        if content is None and not message.get("tool_calls"):
            raise RowFault(f"{where} has no content: it is null or missing; take the row out")
        if content is not None and not isinstance(content, str):
            raise RowFault(f"the content of {where} is {_kind(content)}; text is needed")
        for text in _texts(message):
            _check_whole(text, where)
        return message

    def _check_not_rendered(self) -> None:
        """Raise RowFault for a text that has a template's marks around it: the template would write them again."""
        tokens = (self.tokenizer.convert_ids_to_tokens(end) for end in sorted(self.ends))
        ends = tuple(token for token in tokens if token)
        for column, messages in zip(("prompt", *self.columns), (self.prompt, *self.answers), strict=True):
            for number, message in enumerate(messages):
                if mark := _RENDERED.match(message.get("content") or ""):
                    raise RowFault(
                        f"turn {number} of {column!r} begins with {mark.group().strip()!r}: a chat template has "
                        "already been applied to it; give messages, or the text alone"
                    )
            if column != "prompt" and (messages[-1].get("content") or "").rstrip().endswith(ends):
                raise RowFault(
                    f"an answer ends with the end of turn twice: the text of {column!r} ends with it; take it out of "
                    "the text, the chat template writes it"
                )

    def _settle_calls(self) -> None:
        """Give tool calls the form that the template takes.

        Arguments are JSON text in OpenAI's form and objects in transformers'; a template that takes objects writes JSON
        text as a string within JSON. Some templates need the content that is null beside tool calls.
        """
        given = self.prompt, *self.answers
        why = None
        for toggled, filled in ((False, False), (True, False), (False, True), (True, True)):
            self.prompt, *self.answers = ([_call_form(m, toggled, filled) for m in part] for part in given)
            try:
                texts = [self._render(whole)[0] for whole in self.wholes]
            except RowFault as fault:
                why = why or fault
                continue
            arguments = [text for part in (self.prompt, *self.answers) for text in _argument_texts(part)]
            if all(any(argument in text for text in texts) for argument in arguments):
                return
        self.prompt, *self.answers = given
        if why is not None:
            raise why

    @property
    def wholes(self) -> list[Messages]:
        """The conversations. A begun turn at the end of the prompt and the answer's first turn are one."""
        if not self.begun:
            return [[*self.prompt, *answer] for answer in self.answers]
        *before, begun = self.prompt
        joined = [{**begun, **first, "content": _content(begun) + _content(first)} for first, *_ in self.answers]
        return [[*before, turn, *answer[1:]] for turn, answer in zip(joined, self.answers, strict=True)]

    # rendering

    def _render(self, messages: Messages, **more: Any) -> tuple[str, list[int]]:
        """What the template makes of messages: the text, and its ids."""
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils as theirs

        tools, options = self.tools, {**self.options, **more}
        if self.marks:
            messages, tools = (theirs.mark_control_tokens(part, self.marks) for part in (messages, tools))
        apply = self.tokenizer.apply_chat_template
        try:
            if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
                # A tokenizer that is no Jinja template, such as Mistral's own, writes control tokens as ids alone.
                ids = apply(messages, tokenize=True, return_dict=True, tools=tools, **options)["input_ids"]
                return self.tokenizer.decode(ids), ids
            text = apply(messages, tokenize=False, tools=tools, **options)
        except Exception as error:  # of the template or its sandbox: whatever it is, the row's number belongs to it
            turns = ", ".join(message["role"] for message in messages)
            words = one_line(error) if str(error) else type(error).__name__
            raise RowFault(
                f"the chat template does not take the turns {turns}: {words}; change the row, or the template"
            ) from error
        if not self.marks:
            return text, _encode_text(self.tokenizer, text, add_special_tokens=False)
        try:
            ids = theirs.encode_marked_chat(self.tokenizer, text)
        except Exception as error:
            raise RowFault(f"the text of a control token cannot be encoded as text: {one_line(error)}") from error
        marked = theirs.mark_control_tokens(".", re.compile(r"\."))
        return text.replace(marked[0], "").replace(marked[-1], ""), ids

    def rendered(self) -> Rendered:
        """The row's ids, checked."""
        asked = {"continue_final_message": True} if self.begun else {"add_generation_prompt": True}
        prompt_text, prompt = self._render(self.prompt, **asked)
        texts, wholes = zip(*(self._render(whole) for whole in self.wholes), strict=True)
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
        later = [index for index in range(first + 1, len(whole)) if whole[index]["role"] == "assistant"]
        starts = [start]
        if later and not self.begun:
            self._start_of_turn(whole, first, ids, -1)
        for index in later:
            starts.append(self._start_of_turn(whole, index, ids, starts[-1]))
        spans = []
        for begin, after in pairwise(starts):
            end = next((place for place in range(begin, after) if ids[place] in self.ends), None)
            if end is None:
                raise RowFault(without_end(self.tokenizer))
            spans.append((begin, end + 1))
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

    def _final_end(self, whole: Messages, ids: list[int], start: int) -> tuple[list[int], int]:
        """The ids, and where the last turn ends in them, its end of turn included."""
        end = last = None
        for index in range(len(ids) - 1, start - 1, -1):
            if ids[index] in self.ends:
                end = index  # the first of several: Phi's template writes the end of the text after the end of turn
            elif self.tokenizer.decode(ids[index]).strip():
                last = ids[index]
                break
        if end is not None:
            return ids, end + 1
        if last is None or last in self.tokenizer.added_tokens_decoder:
            raise RowFault(without_end(self.tokenizer))
        self.notes.add("no_end")
        return [*ids, self._next_token(whole, ids)], len(ids) + 1

    def _next_token(self, whole: Messages, ids: list[int]) -> int:
        """What ends a turn that has no end: the beginning of the next one, if generation stops there."""
        followed = self._render([*whole, {"role": "user", "content": "."}])[1]
        same = common_prefix(ids, followed)
        if same == len(ids) < len(followed) and followed[same] in self.ends:
            return followed[same]
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self.ends)

    # what was left out

    def _check_lost(self, prompt_text: str, texts: Sequence[str]) -> None:
        """Note, or raise RowFault for, texts of the row that are not in what was rendered."""
        if not _are_in(texts[0], _tool_texts(self.tools)):
            self.notes.add("tools")
        for message in self.prompt:
            thoughts, said = _split_thoughts(message)
            for key, pieces in (("thoughts", thoughts), ("text", [said]), ("calls", _calls(message))):
                if not _are_in(texts[0], pieces):
                    self.notes.add(f"prompt_{key}")
        for column, answer, text in zip(self.columns, self.answers, texts, strict=True):
            # The generation prompt may hold the beginning of an answer, such as <think>.
            trained = text[common_prefix(prompt_text, text) :]
            parts = trained, prompt_text[-_TAIL:] + trained
            for message in answer:
                self._check_lost_of(message, column, parts)

    def _check_lost_of(self, message: Mapping[str, Any], column: str, parts: Sequence[str]) -> None:
        thoughts, said = _split_thoughts(message)
        calls = _calls(message)
        if not _are_in(parts[0], calls):
            raise RowFault(
                f"the chat template leaves out a tool call of {column!r}, or a part of it ({', '.join(calls)}), so "
                "another answer would be trained; take a template that writes tool calls, or take the row out"
            )
        if not any(_are_in(part, [said]) for part in parts):
            if not calls:
                raise RowFault(f"the chat template leaves out text of {column!r}: {one_line(said, 60)!r}")
            self.notes.add("text")
        if not any(_are_in(part, thoughts) for part in parts):
            self.notes.add("thoughts")


def without_nulls(value: Any) -> Any:
    """The same without the keys that are null: Arrow gives each row the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _tools(tools: Any) -> list[Any] | None:
    """Tools as a list; TRL takes them as JSON text too."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise RowFault(f"'tools' is text that is no JSON: {one_line(error)}") from error
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RowFault(f"'tools' is {_kind(tools)}; a list of JSON schemas is needed, or that as JSON text")
    return without_nulls(tools) or None


def _joined_parts(parts: Sequence[Any], where: str) -> str:
    """The text of content that comes in parts."""
    for part in parts:
        if not isinstance(part, str) and not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise RowFault(f"the content of {where} has a part that is not text ({kind}); only text can be trained")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def _check_answer(answer: list[dict[str, Any]], column: str) -> None:
    if not answer:
        raise RowFault(f"{column!r} has no messages; an assistant turn is needed")
    for which, turn in (("begins", answer[0]), ("ends", answer[-1])):
        if turn["role"] != "assistant":
            raise RowFault(
                f"{column!r} {which} with a turn of role {turn['role']!r}, which is no answer; an answer begins and "
                "ends with an assistant turn"
            )


def _check_whole(text: str, where: str) -> None:
    """Raise RowFault for half a character."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFault(f"{where} has half a character (a lone surrogate) at place {error.start}") from error


def _check_no_json(prompt: str | None, answers: Sequence[str | None]) -> None:
    """Raise RowFault for messages that are kept as JSON text."""
    if _is_messages(prompt) or all(map(_is_messages, answers)):
        raise RowFault("messages are kept as JSON text, which would be trained as it is; read it with json.loads")


def _is_messages(text: str | None) -> bool:
    if not text or not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except ValueError:
        return False
    keys = ({"role", "content"}, {"from", "value"})
    return bool(value) and all(isinstance(turn, dict) and any(k <= set(turn) for k in keys) for turn in value)


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _content(message: Mapping[str, Any]) -> str:
    return message.get("content") or ""


def _texts(value: Any) -> Iterator[str]:
    """Every text in messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


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


def _call_form(message: dict[str, Any], toggled: bool, filled: bool) -> dict[str, Any]:
    """A message whose tool calls' arguments are objects instead of JSON text, or the reverse, and whose content is ''
    instead of missing."""
    if not message.get("tool_calls"):
        return message
    message = {**message, "content": _content(message)} if filled else message
    if not toggled:
        return message
    calls = message["tool_calls"]
    return {**message, "tool_calls": [
        {**call, "function": _toggled(call["function"])} if "function" in call else _toggled(call) for call in calls
    ]}  # fmt: skip


def _toggled(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return dict(function)
    elif arguments is not None:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": arguments}


def _argument_texts(messages: Messages) -> list[str]:
    """Arguments that are JSON text."""
    arguments = [function.get("arguments") for message in messages for function in _functions(message)]
    return [argument for argument in arguments if isinstance(argument, str)]


def _calls(message: Mapping[str, Any]) -> list[str]:
    """Names and arguments of a message's tool calls, as the texts they must be found by."""
    found = []
    for function in _functions(message):
        arguments = function.get("arguments")
        arguments = _toggled(function)["arguments"] if isinstance(arguments, str) else arguments
        found += [str(function.get("name", "")), *_values(arguments)]
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
    content = message.get("content") or ""
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
