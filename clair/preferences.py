"""Preference rows of the formats in use, read into one: prompt, chosen and rejected, or completion and label.

`read_row` reads one row (a dict) and stands alone, so that a stream can be mapped with it; `read_dataset` reads a whole
`datasets.Dataset` and counts what it repaired. Every row is read by itself: none is taken for what another one is. What
is read comes out as lists of messages, or as text where `read_row` says so. See docs/format.md for the formats.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clair.recipe import UserError, file_sha256, one_line
from clair.sources import unpadded

if TYPE_CHECKING:
    from datasets import Dataset

Messages = list[dict[str, Any]]

COLUMNS = ("prompt", "chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
ROLES = ("system", "developer", "user", "assistant", "tool")

_ROLE_NAMES = {
    **{name: name for name in ROLES},
    **dict.fromkeys(("human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai", "chatbot", "llm", "agent", "function_call"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation", "tool_response", "function_response"), "tool"),
}
_TEXTS_OF_PROMPT = ("question", "instruction", "query")
_CONVERSATIONS = ("conversations", "conversation", "messages", "context", "trajectory", "dialogue", "dialog")
_ALIASES = {
    "chosen": ("chosen_response", "preferred_output"),
    "rejected": ("rejected_response", "non_preferred_output"),
    "system": ("system_prompt", "system_message", "system_instruction"),
}
_UNREAD = ("documents", "functions")
READ = (*COLUMNS, "completion", *_TEXTS_OF_PROMPT, *_CONVERSATIONS, *_UNREAD, "input", "system", "history", "tools",
         "chat_template_kwargs", *(alias for aliases in _ALIASES.values() for alias in aliases))  # fmt: skip
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_COMPARED = ("role", "tool_calls", "tool_call_id", "name", "reasoning_content")

_NOTES = {
    "repeated": "repeated the prompt in their answers; read once",
    "blanks": "have copies of the prompt that differ by white space at their ends; read once",
    "roles": "name roles otherwise (human, gpt, bot and the like); read as user, assistant, system and tool",
    "transcript": "are transcripts (Human: ... Assistant: ...); read as messages",
    "system": "have a column of system texts; read as the system turn",
    "input": "have a column 'input'; its text stands under the question",
    "history": "have a column 'history'; its turns stand before the question",
}


def read_row(
    row: Mapping[str, Any], *, keep_text: bool = False, exact: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A preference row of any format that is read, normalised; and what was repaired in it, by the keys of `note_of`.

    The row comes back with `prompt`, `chosen` and `rejected` (or `prompt`, `completion` and the label as it is), as
    lists of messages. A message has a standard `role`, `content` (text; "" beside tool calls alone), and the other keys
    that it came with; the `arguments` of `tool_calls` are objects. `tools`, if the row has any, is a list of objects
    and `chat_template_kwargs` an object. The columns that they were read from are left out, all others stay.

    Text without a prompt column, whose shared beginning is the prompt (TRL's implicit prompt), stays text; and with
    `keep_text`, so does a row whose columns are called as TRL's and hold plain text. Elsewhere a text is one turn.

    `exact`: nulls inside of messages and tools are the user's own. Else they are left out, because Arrow adds the keys
    of all other rows as nulls.

    A row that was read reads as itself. Raises UserError, without the row's number, for what cannot be read.
    """
    reader = _RowReader(dict(row), exact)
    return reader.read(keep_text), list(dict.fromkeys(reader.repairs))


def note_of(repair: str) -> str:
    """What to say of the rows with a repair, to follow "12 of 500 rows "."""
    kind, _, name = repair.partition(":")
    if kind == "unread":
        return f"have a column {name!r} that is neither part of the prompt nor of an answer; not read"
    return _NOTES[kind]


class _RowReader:
    def __init__(self, row: dict[str, Any], exact: bool) -> None:
        self.row = row
        self.exact = exact
        self.repairs: list[str] = []
        self.prompt_column: str | None = None

    def read(self, keep_text: bool) -> dict[str, Any]:
        row = self.row
        for name, aliases in _ALIASES.items():
            alias = next((alias for alias in aliases if row.get(name) is None and row.get(alias) is not None), None)
            if alias:
                row[name] = row.pop(alias)
        request = row.get("input")
        if isinstance(request, Mapping) and "messages" in request:  # OpenAI's format for preferences
            row |= {"input": None, "messages": request["messages"]}
            row.setdefault("tools", request.get("tools"))
        unpaired = row.get("chosen") is None and row.get("completion") is not None
        sides = ("completion",) if unpaired else ("chosen", "rejected")
        answers = [self._value(side) for side in sides]
        tools, options = self._tools(), self._options()
        texts = all(isinstance(answer, str) for answer in answers)
        if texts and not unpaired and not self._has_prompt():
            read = self._implicit_text(*answers)
        elif texts and keep_text and isinstance(prompt := self._value("prompt", None), str) and not self._context():
            read = dict(zip(("prompt", *sides), self._text(sides, prompt, answers), strict=True))
            self._note_unread(list(read.values()))
        else:
            read = self._conversation(dict(zip(sides, answers, strict=True)))
        rest = {name: value for name, value in row.items() if name not in READ}
        return {**rest, **read, **({} if tools is None else {"tools": tools}),
                **({} if options is None else {"chat_template_kwargs": options})}  # fmt: skip

    # Columns

    def _value(self, column: str, default: Any = ...) -> str | Messages:
        """A column's text, or its messages: given as a list, as one message, as JSON text or as a transcript."""
        value = self.row.get(column)
        if value is None and default is not ...:
            return default
        if value is None:
            found = ", ".join(map(str, self.row)) or "none"
            why = "is empty" if column in self.row else f"is missing; columns found: {found}"
            raise UserError(f"{column!r} {why}; text or messages needed")
        if isinstance(value, str):
            value = self._parsed(value, column)
            if isinstance(value, str):
                return value
        if isinstance(value, Mapping):
            value = [value]
        if hasattr(value, "tolist"):  # an array of numpy
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise UserError(f"{column!r} is {_shown(value)}; text or messages needed")
        if not value:
            raise UserError(f"{column!r} is an empty list; text or messages needed")
        if all(isinstance(turn, str) and not _MESSAGES.search(turn) for turn in value):
            raise UserError(
                f"{column!r} is a list of {len(value)} texts; one text or a list of messages needed: make a row of each"
            )
        if all(isinstance(turn, list | tuple) for turn in value):
            raise UserError(
                f"{column!r} is a list of {len(value)} conversations; one list of messages needed: make a row of each"
            )
        return [self._message(turn, f"message {number} of {column!r}") for number, turn in enumerate(value, 1)]

    def _parsed(self, text: str, column: str) -> str | list[Any] | Mapping[str, Any]:
        """Messages that are kept as JSON text or are a transcript; else the text itself."""
        if text.lstrip().startswith(("[", "{", '"', "array(")) and _MESSAGES.search(text):
            value = _literal(text)
            if isinstance(value, str):  # JSON text of JSON text
                inner = self._parsed(value, column)
                return text if isinstance(inner, str) else inner
            if isinstance(value, list):
                value = [_literal(turn) if isinstance(turn, str) else turn for turn in value]
            if value is None and _FIRST_KEY.match(text):
                raise UserError(
                    f"{column!r} looks like messages, but is not JSON: {_shown(text)}; write it by json.dumps"
                )
            turns = [value] if isinstance(value, Mapping) else value
            if isinstance(turns, list) and turns and all(map(_is_message, turns)):
                return turns
        if turns := _transcript(text, is_prompt=column == "prompt"):
            self.repairs.append("transcript")
            return turns
        return text

    def _message(self, turn: Any, where: str) -> dict[str, Any]:
        if isinstance(turn, str):
            try:
                turn = json.loads(turn)
            except ValueError as error:
                raise UserError(f"{where} is {_shown(turn)}; an object with role and content needed") from error
        if not isinstance(turn, Mapping):
            raise UserError(f"{where} is {_shown(turn)}; an object with role and content needed")
        message = {str(key): value for key, value in turn.items() if value is not None}
        if not self.exact:
            message = unpadded(message)
        key = next((key for key in _ROLE_KEYS if key in message), "role")
        role = message.pop(key, None)
        content = message.pop(next((key for key in _CONTENT_KEYS if key in message), "content"), None)
        if role is None:
            keys = ", ".join(map(str, turn)) or "none"
            raise UserError(f"{where} has no role; keys found: {keys}; needed: role and content")
        name = _ROLE_NAMES.get(str(role).strip().lower())
        if name is None:
            raise UserError(f"{where} has the role {role!r}; allowed: {', '.join(ROLES)}, human, gpt and the like")
        if name != role and key == "role":
            self.repairs.append("roles")
        if str(role).strip().lower() == "function_call":  # ShareGPT's: the call is the turn's text
            content, message["tool_calls"] = "", self._called(content, where)
        if "function_call" in message:  # OpenAI's before tool_calls
            message["tool_calls"] = self._called(message.pop("function_call"), where)
        if "tool_calls" in message:
            message["tool_calls"] = self._calls(message["tool_calls"], where)
            if not message["tool_calls"]:
                del message["tool_calls"]
        return {"role": name, "content": self._content(content, message, where), **message}

    def _content(self, content: Any, message: Mapping[str, Any], where: str) -> str:
        content = None if content == [] else content
        if content is None and ("tool_calls" in message or message.get("reasoning_content")):
            return ""
        if content is None:
            raise UserError(f"{where} has no content; text needed, unless the message has tool_calls")
        if isinstance(content, str):
            return checked(content, where)
        if isinstance(content, list | tuple):
            return "".join(self._part(part, where) for part in content)
        raise UserError(f"{where} has content {_shown(content)}; text needed")

    def _part(self, part: Any, where: str) -> str:
        if isinstance(part, str):
            return checked(part, where)
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "input_text", "output_text"):
            raise UserError(f"{where} has a content part of type {kind!r}; only parts of type 'text' are read")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a content part whose text is {_shown(part.get('text'))}; text needed")
        return checked(part["text"], where)

    def _called(self, value: Any, where: str) -> list[Any]:
        """The calls of a turn in ShareGPT's `function_call`, or in OpenAI's key of that name."""
        calls = self._json(value, f"the function call of {where}")
        calls = calls if isinstance(calls, list) else [calls]
        return [{"type": "function", "function": call} for call in calls]

    def _calls(self, value: Any, where: str) -> list[dict[str, Any]]:
        where = f"tool_calls of {where}"
        return [self._call(call, where) for call in self._objects(value, where)]

    def _call(self, call: dict[str, Any], where: str) -> dict[str, Any]:
        holder = call.get("function") if isinstance(call.get("function"), Mapping) else call
        if not isinstance(holder.get("name"), str):
            raise UserError(f"{where}: a call without the name of its function: {_shown(call)}")
        if holder.get("arguments") in (None, ""):  # of a function that takes none
            holder = {**holder, "arguments": {}}
        if isinstance(holder["arguments"], str):  # OpenAI's form; templates print objects
            try:
                arguments = json.loads(holder["arguments"])
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                holder = {**holder, "arguments": arguments}
        return {**call, "function": dict(holder)} if "function" in call else dict(holder)

    def _json(self, value: Any, where: str) -> Any:
        """A value that may be kept as JSON text, or Python's own; nulls that Arrow added are left out."""
        if not isinstance(value, str):
            return value if self.exact else unpadded(value)
        read = _literal(value)
        if read is None and value.strip() != "null":
            raise UserError(f"{where} is not JSON: {_shown(value)}; write it by json.dumps")
        return read

    def _objects(self, value: Any, where: str) -> list[dict[str, Any]]:
        """A list of objects, where it or each of them may be JSON text."""
        values = self._json(value, where)
        values = values if isinstance(values, list | tuple) else [values]
        values = [self._json(one, where) if isinstance(one, str) else one for one in values]
        if not all(isinstance(one, Mapping) for one in values):
            raise UserError(f"{where} is {_shown(value)}; a list of objects, or its JSON text, needed")
        return [dict(one) for one in values]

    def _tools(self) -> list[dict[str, Any]] | None:
        value = self.row.get("tools")
        if value is None or value == "":
            return None
        return self._objects(value, "'tools'") or None

    def _options(self) -> dict[str, Any] | None:
        value = self.row.get("chat_template_kwargs")
        if value is None or value == "":
            return None
        options = self._json(value, "'chat_template_kwargs'")
        if not isinstance(options, Mapping):
            raise UserError(f"'chat_template_kwargs' is {_shown(value)}; an object needed")
        return dict(options) or None

    # Prompts

    def _has_prompt(self) -> bool:
        return any(self.row.get(name) is not None for name in ("prompt", *_TEXTS_OF_PROMPT, *_CONVERSATIONS, "input"))

    def _context(self) -> bool:
        """True if the row has text beside its prompt that belongs to it."""
        return any(isinstance(self.row.get(name), str) and self.row[name].strip() for name in ("system", "input")) or (
            bool(self.row.get("history"))
        )

    def _implicit_text(self, chosen: str, rejected: str) -> dict[str, str]:
        """TRL's rule: the shared beginning is the prompt, without a space at its end."""
        if self._context():
            self.repairs += [f"unread:{name}" for name in ("system", "history") if self.row.get(name)]
        chosen, rejected = checked(chosen, "'chosen'"), checked(rejected, "'rejected'")
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if shared and chosen[shared - 1] == " ":
            shared -= 1
        if not chosen[:shared].strip():
            raise UserError(
                f"there is no prompt: no column 'prompt', and 'chosen' ({_shown(chosen)}) and 'rejected' "
                f"({_shown(rejected)}) share no beginning; columns found: {', '.join(map(str, self.row))}"
            )
        return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}

    def _text(self, sides: Sequence[str], prompt: str, answers: Sequence[str]) -> tuple[str, ...]:
        """Prompt and answers as text, without the prompt where every answer begins with it."""
        if not prompt.strip():
            raise UserError("'prompt' is empty; text needed")
        for column, text in zip(("prompt", *sides), (prompt, *answers), strict=True):
            checked(text, repr(column))
        if all(answer.startswith(prompt) and _repeats(answer, prompt) for answer in answers):
            self.repairs.append("repeated")
            return prompt, *(answer[len(prompt) :] for answer in answers)
        return prompt, *answers

    def _conversation(self, answers: dict[str, str | Messages]) -> dict[str, Messages]:
        whole = [answer for answer in answers.values() if isinstance(answer, list) and _is_whole(answer)]
        prompt = self._prompt(bool(whole) and len(answers) == 2)
        turns = {side: self._turns(side, answer, prompt, answers) for side, answer in answers.items()}
        if len(turns) == 2 and whole:
            prompt, turns["chosen"], turns["rejected"] = self._implicit(prompt, turns["chosen"], turns["rejected"])
        prompt = self._with_system(_without_answer(prompt, turns))
        self._check(prompt, turns)
        self._note_unread([turn["content"] for part in (prompt, *turns.values()) for turn in part])
        return {"prompt": prompt, **turns}

    def _turns(self, side: str, answer: str | Messages, prompt: Messages, answers: Mapping[str, Any]) -> Messages:
        """An answer as messages: a text is one turn, without the question where all answers are text and repeat it."""
        if isinstance(answer, list):
            return answer
        question = prompt[-1]["content"] if prompt else ""
        if all(isinstance(other, str) and _repeats(other, question) for other in answers.values()):
            self.repairs.append("repeated")
            answer = answer[len(question.strip()) :].lstrip()
        elif "transcript" in self.repairs:  # its texts stand after "Assistant:", with a space
            answer = answer.removeprefix(" ")
        return [{"role": "assistant", "content": checked(answer, repr(side))}]

    def _prompt(self, whole: bool) -> Messages:
        """The row's own prompt as messages, with the texts beside it; none where `whole` answers hold it."""
        row = self.row
        text_columns = ("prompt", *_TEXTS_OF_PROMPT)
        column = next((name for name in text_columns if row.get(name) is not None), None)
        if whole and column and (not row[column] or (isinstance(row[column], str) and not row[column].strip())):
            column = None
        if column is None and not whole:
            column = next((name for name in (*_CONVERSATIONS, "input") if row.get(name) is not None), None)
        if column is None:
            return []
        self.prompt_column = column
        value = self._value(column)
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{column!r} is empty; text or messages needed")
        messages = [{"role": "user", "content": checked(value, repr(column))}] if isinstance(value, str) else value
        for name in (*(name for name in text_columns if name != column), *(("input",) if column != "input" else ())):
            messages = self._beside(messages, name, isinstance(value, str))
        if history := row.get("history"):
            messages = self._history(history) + messages
            self.repairs.append("history")
        return messages

    def _note_unread(self, texts: Sequence[str]) -> None:
        """Note the columns of conversations that have a text which is in none of `texts`, and those of documents."""
        said = "\n".join(texts)
        for name in _CONVERSATIONS:
            value = self.row.get(name) if name != self.prompt_column else None
            value = _literal(value) or value if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
            if any(text.strip() not in said for text in _texts_of(value)):
                self.repairs.append(f"unread:{name}")
        values = ((name, self.row.get(name)) for name in _UNREAD)
        self.repairs += [
            f"unread:{name}"
            for name, value in values
            if value and not (isinstance(value, str) and value.strip() in said)
        ]

    def _beside(self, messages: Messages, name: str, is_text: bool) -> Messages:
        """The prompt with the text of another column: `input` stands under the question, others are told of."""
        text = self.row.get(name)
        if not isinstance(text, str) or not text.strip():
            return messages
        if any(text.strip() in message["content"] for message in messages):
            return messages
        if name != "input" or not is_text:
            self.repairs.append(f"unread:{name}")
            return messages
        self.repairs.append("input")
        return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n\n{checked(text, 'input')}"}]

    def _history(self, history: Any) -> Messages:
        rounds = self._json(history, "'history'")
        rounds = rounds if isinstance(rounds, list | tuple) else [rounds]
        if all(isinstance(turn, Mapping) for turn in rounds):
            return [self._message(turn, f"message {number} of 'history'") for number, turn in enumerate(rounds, 1)]
        if not all(isinstance(turns, list | tuple) and len(turns) == 2 for turns in rounds) or not all(
            isinstance(text, str) for turns in rounds for text in turns
        ):
            raise UserError(f"'history' is {_shown(history)}; a list of [question, answer] needed")
        names = ("user", "assistant")
        return [{"role": name, "content": text} for turns in rounds for name, text in zip(names, turns, strict=True)]

    def _with_system(self, prompt: Messages) -> Messages:
        text = self.row.get("system")
        if text is None or text == "":
            return prompt
        if not isinstance(text, str):
            raise UserError(f"'system' is {_shown(text)}; text needed")
        if not text.strip():
            return prompt
        if prompt and prompt[0]["role"] in ("system", "developer"):
            if text.strip() not in prompt[0]["content"]:
                self.repairs.append("unread:system")
            return prompt
        self.repairs.append("system")
        return [{"role": "system", "content": checked(text, "'system'")}, *prompt]

    def _implicit(self, prompt: Messages, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
        """Prompt and answers of whole conversations; the prompt column is one with their shared beginning."""
        if prompt and _is_whole(chosen) != _is_whole(rejected):
            return prompt, *(self._behind(prompt, answer) for answer in (chosen, rejected))
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and _same([chosen[shared]], [rejected[shared]]):
            shared += 1
        while shared and chosen[shared - 1]["role"] == "assistant":  # an answer starts where the assistant does
            shared -= 1
        common = chosen[:shared]
        if shared and any(one["content"] != other["content"] for one, other in zip(common, rejected, strict=False)):
            self.repairs.append("blanks")
        if not shared and not prompt:
            raise UserError(
                f"there is no prompt: 'chosen' begins with {_turn(chosen[0])} and 'rejected' with "
                f"{_turn(rejected[0])}; the two must share their first turns, or a column 'prompt' must hold them"
            )
        answers = chosen[shared:], rejected[shared:]
        if not prompt or not shared:
            return prompt or common, *answers
        if _holds(common, prompt):
            self.repairs.append("repeated" if _holds(common, prompt, exactly=True) else "blanks")
            return common, *answers
        if _same(prompt[-shared:], common):
            self.repairs.append("repeated" if _same(prompt[-shared:], common, exactly=True) else "blanks")
            return prompt, *answers
        if prompt[-1]["role"] == "assistant" and common[0]["role"] == "user":
            return prompt + common, *answers
        raise UserError(
            f"the prompt ends with {_turn(prompt[-1])}, and the conversations of 'chosen' and 'rejected' begin with "
            f"{_turn(common[0])}; leave the prompt out of one of them, or make the two equal"
        )

    def _behind(self, prompt: Messages, answer: Messages) -> Messages:
        """An answer without the prompt that it begins with."""
        if len(answer) <= len(prompt) or not _same(answer[: len(prompt)], prompt):
            return answer
        self.repairs.append("repeated")
        return answer[len(prompt) :]

    def _check(self, prompt: Messages, answers: Mapping[str, Messages]) -> None:
        if not prompt:
            found = ", ".join(map(str, self.row))
            raise UserError(f"there is no prompt: no column 'prompt' or 'question'; columns found: {found}")
        if not any(turn["content"].strip() for turn in prompt):
            raise UserError("'prompt' is empty: no turn of it has text")
        for side, turns in answers.items():
            for turn, which in ((turns[0], "begins"), (turns[-1], "ends")):
                if turn["role"] != "assistant":
                    of = "which is the prompt's" if which == "begins" else "which is no answer"
                    raise UserError(
                        f"{side!r} {which} with a {turn['role']} turn, {of}: {_shown(turn['content'])}; an answer is "
                        "assistant turns, with tool and user turns between them at most"
                    )
            if wrong := next((turn for turn in turns if turn["role"] in ("system", "developer")), None):
                raise UserError(f"{side!r} has a {wrong['role']} turn after the prompt: {_shown(wrong['content'])}")


def _texts_of(value: Any) -> list[str]:
    """A text, or the texts in a list of texts or messages: none of their keys but those of what was said."""
    if isinstance(value, str):
        return [value]
    turns = value if isinstance(value, list | tuple) else [value]
    keys = (*_CONTENT_KEYS, "input", "output")
    said = [turn.get(key) for turn in turns if isinstance(turn, Mapping) for key in keys]
    return [text for text in (*said, *turns) if isinstance(text, str)]


def _shown(value: Any, most: int = 60) -> str:
    """A value in an error: JSON or Python's own, on one line, cut."""
    text = one_line(repr(value), most + 1)
    return text if len(text) <= most else text[: most - 1] + "…"


def _turn(message: Mapping[str, Any]) -> str:
    return f"the {message['role']} turn {_shown(message['content'])}"


def checked(text: str, where: str) -> str:
    """`text`, which UTF-8 can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = _shown(text[max(0, error.start - 10) : error.end + 10])
            raise UserError(
                f"{where} holds half of a surrogate pair ({around}), which is no text; mend or remove the row"
            ) from error
    return text


_MESSAGES = re.compile(r"""['"](?:role|from|speaker)\\*['"]\s*:""")
_FIRST_KEY = re.compile(r"""\s*(?:array\()?\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:\s*['"]""")


def _literal(text: str) -> Any:
    """The value of JSON text, or of Python's own, as pandas writes lists into a CSV; None where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and (
        ("role" in turn and ("content" in turn or "tool_calls" in turn))
        or ("from" in turn and isinstance(turn.get("value"), str))
        or (
            isinstance(turn.get("text"), str)
            and any(str(turn.get(key)).lower() in _ROLE_NAMES for key in ("role", "speaker"))
        )
    )


_SPEAKERS = r"(human|user|assistant|system)[ \t]*:[ \t]?"
_FIRST_SPEAKER = re.compile(r"\s*(###[ \t]*)?(?:human|user|system)[ \t]*:", re.IGNORECASE)
_SPEAKER = re.compile(rf"(?:\A\s*|\r?\n\r?\n\s*){_SPEAKERS}", re.IGNORECASE)
_HEADED_SPEAKER = re.compile(rf"(?:\A|\r?\n)\s*###[ \t]*{_SPEAKERS}", re.IGNORECASE)


def _transcript(text: str, *, is_prompt: bool) -> Messages:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", Anthropic's form, or of "### Human: ..."; none where the
    text is no transcript.

    A prompt may end with "Assistant:"; an answer that does is empty.
    """
    first = _FIRST_SPEAKER.match(text)
    if not first:
        return []
    marks = list((_HEADED_SPEAKER if first[1] else _SPEAKER).finditer(text))
    if not any(mark[1].lower() == "assistant" for mark in marks):
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        {"role": _ROLE_NAMES[mark[1].lower()], "content": text[mark.end() : end]}
        for mark, end in zip(marks, ends, strict=True)
    ]
    if is_prompt and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def _is_whole(turns: Messages) -> bool:
    """True if messages hold the prompt too: they begin with another turn than the assistant's."""
    return turns[0]["role"] != "assistant"


def _key(message: Mapping[str, Any], exactly: bool) -> tuple[Any, ...]:
    content = message["content"] if exactly else message["content"].strip()
    return (content, *(message.get(name) for name in _COMPARED))


def _same(turns: Messages, others: Messages, *, exactly: bool = False) -> bool:
    """True if turns are equal, but for white space at their ends."""
    return [_key(turn, exactly) for turn in turns] == [_key(turn, exactly) for turn in others]


def _holds(turns: Messages, part: Messages, *, exactly: bool = False) -> bool:
    """True if `part` is among `turns`, in one piece."""
    starts = range(len(turns) - len(part) + 1)
    return any(_same(turns[start : start + len(part)], part, exactly=exactly) for start in starts)


def _repeats(answer: str, prompt: str) -> bool:
    """True if a text begins with the prompt, which is more than a word of it."""
    prompt = prompt.strip()
    return len(prompt.split()) > 1 and answer.startswith(prompt) and answer[len(prompt) : len(prompt) + 1].isspace()


def _without_answer(prompt: Messages, turns: Mapping[str, Messages]) -> Messages:
    """The prompt without its last turn where that is one of the answers."""
    repeated = len(prompt) > 1 and any(_same(prompt[-1:], answer) for answer in turns.values())
    return prompt[:-1] if repeated else prompt


# ---- whole datasets


@dataclass(frozen=True)
class Preferences:
    """A dataset that was read, and what to tell of it: how many rows were repaired, and how."""

    dataset: Dataset
    notes: list[str] = field(default_factory=list)


ROW, FOUND = "_row", "_found"
CODE = file_sha256(__file__)
"""Part of every key of `datasets`' cache: rows that another version read are not taken for what this one reads."""
_OBJECTS = ("tools", "chat_template_kwargs")


def read_dataset(dataset: Dataset, where: str, *, keep_text: bool = False, num_proc: int | None = None) -> Preferences:
    """A dataset with each row as `read_row` reads it: `prompt`, `chosen` and `rejected`, or completion and label.

    Messages are structs of role and content; where messages have more, of text, with objects such as `tool_calls` as
    JSON text, so that Arrow adds nothing to them. `tools` and `chat_template_kwargs` are JSON text, as TRL takes them.
    `restored_row` turns each of its rows into what `read_row` read. Other columns stay.

    `where` names the dataset in errors. With `keep_text`, a set that is all plain text stays text. Raises UserError
    with the number of the first row that cannot be read.
    """
    if _is_clean(dataset):
        return Preferences(dataset)
    rest = {column: dataset.features[column] for column in dataset.column_names if column not in READ}
    encoded = dataset.map(
        _encode_rows, batched=True, with_indices=True, num_proc=num_proc, desc="Reading rows",
        remove_columns=[column for column in dataset.column_names if column not in rest],
        fn_kwargs={"where": where, "keep_text": keep_text, "features": dataset.features, "code": CODE},
        features=encoded_features(rest),
    )  # fmt: skip
    if keep_text and is_mixed(count_found(encoded)):
        return read_dataset(dataset, where, num_proc=num_proc)
    return decode(encoded, where, num_proc=num_proc)


def check_columns(columns: Sequence[str], where: str, *, pairs: bool = False, change: str = "rename yours") -> None:
    """Raises UserError where the columns of a dataset are neither those of pairs nor those of unpaired rows.

    `pairs`: unpaired rows are none that will do. `change` is what the user can do.
    """
    unpaired = not pairs and "completion" in columns and "chosen" not in columns
    needed = UNPAIRED_COLUMNS[1:] if unpaired else COLUMNS[1:]
    if missing := [name for name in needed if not {name, *_ALIASES.get(name, ())} & set(columns)]:
        found = ", ".join(columns) or "none"
        needed = ", ".join(UNPAIRED_COLUMNS if unpaired else COLUMNS)
        raise UserError(f"{where} has no column {missing[0]!r}; found: {found}; needed: {needed}; {change}")


def encoded_features(rest: Mapping[str, Any]) -> Any:
    """The columns of encoded rows, beside the `rest` of theirs."""
    from datasets import Features, List, Value

    return Features({**rest, ROW: Value("string"), FOUND: List(Value("string"))})


def _encode_rows(
    batch: Mapping[str, list[Any]], indices: Sequence[int], where: str, keep_text: bool, features: Mapping[str, Any],
    code: str,
) -> dict[str, list[Any]]:  # fmt: skip
    read = [name for name in batch if name in READ]
    encoded = []
    for number, index in enumerate(indices):
        row = {name: values[number] for name, values in batch.items()}
        row |= {name: _unpadded_by(row[name], features[name]) for name in read}
        encoded.append(encode_row(row, f"{where}, row {index}", keep_text=keep_text))
    return {ROW: [row for row, _ in encoded], FOUND: [found for _, found in encoded]}


def encode_row(row: Mapping[str, Any], where: str, *, keep_text: bool = False) -> tuple[str, list[str]]:
    """What `read_row` reads, as JSON text, and what was found: the kind, the repairs, the keys of the messages.

    Raises UserError that says `where` the row stands.
    """
    try:
        read, repairs = read_row(row, keep_text=keep_text, exact=True)
    except UserError as error:
        named = "" if row.get("id") is None else f" (id {row['id']})"
        raise UserError(f"{where}{named}: {error}") from error
    sides = {name: read[name] for name in (*COLUMNS, "completion") if name in read and name in _SIDES}
    found = {f"repair:{repair}": None for repair in repairs}
    for name, value in sides.items():
        found[f"column:{name}"] = None
        found[f"kind:{'text' if isinstance(value, str) else 'messages'}"] = None
        for turn in value if isinstance(value, list) else ():
            found |= {f"key:{key}:{_type_name(turn[key])}": None for key in turn if key not in ("role", "content")}
    objects = {name: read[name] for name in _OBJECTS if name in read}
    found |= {f"column:{name}": None for name in objects}
    text = json.dumps({**sides, **objects}, ensure_ascii=False)
    return checked(text, f"{where}: a tool or a key of a message"), list(found)


_SIDES = ("prompt", "chosen", "rejected", "completion")
_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}


def _type_name(value: Any) -> str:
    return _TYPES.get(type(value), "json")


def decode(encoded: Dataset, where: str, *, num_proc: int | None = None) -> Preferences:
    """Encoded rows as columns, and the notes of them. Raises UserError where some rows are text and others messages."""
    from datasets import Features, List, Value

    counts = count_found(encoded)
    if is_mixed(counts):
        kinds = [any(found == "kind:text" for found in row) for row in encoded[FOUND][:]]
        text, messages = kinds.index(True), kinds.index(False)
        raise UserError(
            f"{where}: row {text} is plain text and row {messages} messages; give all rows one of the two forms"
        )
    keys: dict[str, set[str]] = {}
    for found in counts:
        if found.startswith("key:"):
            _, key = found.split(":", 1)
            keys.setdefault(key.rsplit(":", 1)[0], set()).add(key.rsplit(":", 1)[1])
    # Values of one type keep it; the rest is JSON text, which Arrow can add nothing to.
    types = {key: types.pop() if len(types) == 1 else "json" for key, types in keys.items()}
    message = {key: Value("string" if kind == "json" else kind) for key, kind in sorted(types.items())}
    message = {"role": Value("string"), "content": Value("string"), **message}
    column = Value("string") if counts["kind:text"] else List(message)
    names = [name for name in (*_SIDES, *_OBJECTS) if counts[f"column:{name}"]]
    features = {name: Value("string") if name in _OBJECTS else column for name in names}
    rest = {name: feature for name, feature in encoded.features.items() if name not in (ROW, FOUND)}
    decoded = encoded.map(
        _decode_rows, batched=True, input_columns=[ROW], remove_columns=[ROW, FOUND], num_proc=num_proc,
        desc="Reading rows", features=Features({**rest, **features}),
        fn_kwargs={"names": names, "json_keys": sorted(key for key, kind in types.items() if kind == "json"),
                   "code": CODE},
    )  # fmt: skip
    return Preferences(decoded, _notes(counts, len(encoded)))


def count_found(encoded: Dataset) -> Counter[str]:
    """In how many encoded rows each thing was found."""
    import pyarrow.compute as pc

    counts: Counter[str] = Counter()
    for batch in encoded.select_columns([FOUND]).with_format("arrow").iter(batch_size=10_000):
        for count in pc.value_counts(batch[FOUND].combine_chunks().flatten()).to_pylist():
            counts[count["values"]] += count["counts"]
    return counts


def is_mixed(counts: Mapping[str, int]) -> bool:
    """True if some rows are text and others messages."""
    return bool(counts["kind:text"] and counts["kind:messages"])


def _decode_rows(rows: list[str], names: Sequence[str], json_keys: Sequence[str], code: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row in map(json.loads, rows):
        for name in names:
            value = row.get(name)
            if isinstance(value, list) and name in _SIDES:
                for turn in value:
                    turn |= {key: json.dumps(turn[key], ensure_ascii=False) for key in json_keys if key in turn}
            elif value is not None and name in _OBJECTS:
                value = json.dumps(value, ensure_ascii=False)
            columns[name].append(value)
    return columns


def restored_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_row` gave for a row of a dataset of `read_dataset`: without the nulls that Arrow added, and with the
    objects that are kept as JSON text. Nothing is read or checked again."""
    restored = {name: value for name, value in row.items() if value is not None or name not in READ}
    for name in _SIDES:
        if isinstance(restored.get(name), list):
            restored[name] = [_restored_turn(turn) for turn in restored[name]]
    return restored | {name: json.loads(restored[name]) for name in _OBJECTS if name in restored}


def _restored_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    restored = {key: value for key, value in turn.items() if value is not None}
    return restored | ({"tool_calls": json.loads(turn["tool_calls"])} if "tool_calls" in restored else {})


def _notes(counts: Mapping[str, int], rows: int) -> list[str]:
    repairs = sorted((key.removeprefix("repair:"), count) for key, count in counts.items() if key.startswith("repair:"))
    return [f"{count:,} of {rows:,} rows {note_of(repair)}" for repair, count in repairs]


def _unpadded_by(value: Any, feature: Any) -> Any:
    """A value of an Arrow column without the keys that are null; what is JSON inside has the user's own nulls."""
    if isinstance(value, list):
        inner = getattr(feature, "feature", None)
        return value if inner is None else [_unpadded_by(one, inner) for one in value]
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {key: _unpadded_by(one, feature.get(key)) for key, one in value.items() if one is not None}
    return value


def _is_clean(dataset: Dataset) -> bool:
    """True if every row is what `read_row` makes of it, as the pairs that `clair build` writes are: looked at as Arrow
    columns, a second for a million rows."""
    from datasets import List, Value

    message = List({"role": Value("string"), "content": Value("string")})
    columns = set(dataset.column_names)
    sides = COLUMNS if "chosen" in columns else ("prompt", "completion")
    if columns & set(READ) != set(sides) or any(dataset.features[side] != message for side in sides):
        return False
    batches = dataset.select_columns(list(sides)).with_format("arrow").iter(batch_size=10_000)
    return all(_is_clean_prompt(batch["prompt"]) and all(_is_one_answer(batch[side]) for side in sides[1:])
               for batch in batches)  # fmt: skip


def _is_clean_prompt(column: Any) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    turns = column.combine_chunks()
    if not _are_messages(turns, ROLES):
        return False
    last = turns.values.field("role").take(pc.subtract(turns.offsets[1:], 1))
    said = pc.utf8_trim_whitespace(turns.values.field("content").take(pc.subtract(turns.offsets[1:], 1)))
    return not pc.any(pc.or_(pc.equal(last, pa.scalar("assistant")), pc.equal(said, pa.scalar("")))).as_py()


def _is_one_answer(column: Any) -> bool:
    import pyarrow.compute as pc

    turns = column.combine_chunks()
    return _are_messages(turns, ("assistant",)) and pc.max(turns.value_lengths()).as_py() == 1


def _are_messages(turns: Any, roles: Sequence[str]) -> bool:
    """True if no list of a column is null or empty, and each message has a role of these and content."""
    import pyarrow as pa
    import pyarrow.compute as pc

    messages = turns.flatten()
    if turns.null_count or messages.null_count or pc.min(turns.value_lengths()).as_py() == 0:
        return False
    named, content = messages.field("role"), messages.field("content")
    return not content.null_count and pc.all(pc.is_in(named, pa.array(roles))).as_py()
