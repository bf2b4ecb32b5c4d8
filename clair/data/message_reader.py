"""Read messages from a column of a preference row: a list, one message, JSON text, or a transcript."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from clair.core.errors import UserError, one_line
from clair.data.row_files import drop_nulls
from clair.data.row_formats import ROLE_NAMES, ROLES

Messages = list[dict[str, Any]]

_ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
_HAS_ROLE_KEY = re.compile(r"""['"](?:role|from|speaker)\\*['"]\s*:""")
_STARTS_LIKE_MESSAGES = re.compile(r"""\s*(?:array\()?\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:\s*['"]""")
_SPEAKERS = r"(human|user|assistant|system)[ \t]*:[ \t]?"
_FIRST_SPEAKER = re.compile(r"\s*(###[ \t]*)?(?:human|user|system)[ \t]*:", re.IGNORECASE)
_SPEAKER = re.compile(rf"(?:\A\s*|\r?\n\r?\n\s*){_SPEAKERS}", re.IGNORECASE)
_HEADED_SPEAKER = re.compile(rf"(?:\A|\r?\n)\s*###[ \t]*{_SPEAKERS}", re.IGNORECASE)


@dataclass(slots=True)
class MessageReader:
    """Reads the messages of one row, and records in `repairs` what was repaired (keys of `repair_note`).

    A message gets a standard `role` and text `content` ("" beside tool calls alone); its other keys stay. The
    `arguments` of `tool_calls` become objects.
    """

    keep_nulls: bool
    """Nulls inside messages and tools belong to the row. Otherwise they come from Arrow."""
    repairs: list[str] = field(default_factory=list)

    def read(self, value: Any, column: str) -> str | Messages:
        """The text of a column, or its messages. Raises UserError for any other value."""
        if isinstance(value, str):
            value = self._parse_text(value, column)
            if isinstance(value, str):
                return value
        if isinstance(value, Mapping):
            value = [value]
        if hasattr(value, "tolist"):  # a numpy array
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise UserError(f"{column!r} is {excerpt(value)}; text or messages needed")
        if not value:
            raise UserError(f"{column!r} is an empty list; text or messages needed")
        if all(isinstance(turn, str) and not _HAS_ROLE_KEY.search(turn) for turn in value):
            raise UserError(
                f"{column!r} is a list of {len(value)} texts; one text or a list of messages needed: make a row of each"
            )
        if all(isinstance(turn, list | tuple) for turn in value):
            raise UserError(
                f"{column!r} is a list of {len(value)} conversations; one list of messages needed: make a row of each"
            )
        return [self.message(turn, f"message {number} of {column!r}") for number, turn in enumerate(value, 1)]

    def _parse_text(self, text: str, column: str) -> str | list[Any]:
        """The messages in JSON text or in a transcript; else the text itself."""
        if text.lstrip().startswith(("[", "{", '"', "array(")) and _HAS_ROLE_KEY.search(text):
            value = parse_literal(text)
            if isinstance(value, str):  # JSON text of JSON text
                inner = self._parse_text(value, column)
                return text if isinstance(inner, str) else inner
            if value is None and _STARTS_LIKE_MESSAGES.match(text):
                raise UserError(
                    f"{column!r} looks like messages, but is not JSON: {excerpt(text)}; write it by json.dumps"
                )
            if turns := _turns([value] if isinstance(value, Mapping) else value):
                return turns
        if turns := _parse_transcript(text, is_prompt=column == "prompt"):
            self.repairs.append("transcript")
            return turns
        return text

    def message(self, turn: Any, location: str) -> dict[str, Any]:
        """One message, normalised. `location` names it in errors."""
        if isinstance(turn, str):
            with suppress(ValueError):
                turn = json.loads(turn)
        if not isinstance(turn, Mapping):
            raise UserError(f"{location} is {excerpt(turn)}; an object with role and content needed")
        message = {str(key): value for key, value in turn.items() if value is not None}
        if not self.keep_nulls:
            message = drop_nulls(message)
        role_key = next((key for key in _ROLE_KEYS if key in message), "role")
        role = message.pop(role_key, None)
        content = message.pop(next((key for key in CONTENT_KEYS if key in message), "content"), None)
        if role is None:
            keys = ", ".join(map(str, turn)) or "none"
            raise UserError(f"{location} has no role; keys found: {keys}; needed: role and content")
        lowered = str(role).strip().lower()
        name = ROLE_NAMES.get(lowered)
        if name is None:
            raise UserError(f"{location} has the role {role!r}; allowed: {', '.join(ROLES)}, human, gpt and the like")
        if name != role and role_key == "role":
            self.repairs.append("roles")
        if lowered == "function_call":  # ShareGPT's: the call is the text of the turn
            content, message["tool_calls"] = "", self._function_calls(content, location)
        if "function_call" in message:  # OpenAI's key before tool_calls
            message["tool_calls"] = self._function_calls(message.pop("function_call"), location)
        if "tool_calls" in message:
            calls_location = f"tool_calls of {location}"
            calls = self.objects(message["tool_calls"], calls_location)
            message["tool_calls"] = [self._tool_call(call, calls_location) for call in calls]
            if not calls:
                del message["tool_calls"]
        return {"role": name, "content": self._content(content, message, location), **message}

    def _content(self, content: Any, message: Mapping[str, Any], location: str) -> str:
        content = None if content == [] else content
        if content is None and ("tool_calls" in message or message.get("reasoning_content")):
            return ""
        if content is None:
            raise UserError(f"{location} has no content; text needed, unless the message has tool_calls")
        if isinstance(content, str):
            return require_utf8(content, location)
        if isinstance(content, list | tuple):
            return "".join(self._content_text(item, location) for item in content)
        raise UserError(f"{location} has content {excerpt(content)}; text needed")

    def _content_text(self, item: Any, location: str) -> str:
        """The text of one item of a content list."""
        if isinstance(item, str):
            return require_utf8(item, location)
        kind = item.get("type", "text") if isinstance(item, Mapping) else type(item).__name__
        if kind not in ("text", "input_text", "output_text"):
            raise UserError(f"{location} has a content part of type {kind!r}; only parts of type 'text' are read")
        if not isinstance(item.get("text"), str):
            raise UserError(f"{location} has a content part whose text is {excerpt(item.get('text'))}; text needed")
        return require_utf8(item["text"], location)

    def _function_calls(self, value: Any, location: str) -> list[Any]:
        """The calls in ShareGPT's turn `function_call`, or in OpenAI's key of that name."""
        calls = self.parse_json(value, f"the function call of {location}")
        calls = calls if isinstance(calls, list) else [calls]
        return [{"type": "function", "function": call} for call in calls]

    def _tool_call(self, call: dict[str, Any], location: str) -> dict[str, Any]:
        nested = call.get("function")
        function: Mapping[str, Any] = nested if isinstance(nested, Mapping) else call
        if not isinstance(function.get("name"), str):
            raise UserError(f"{location}: a call without the name of its function: {excerpt(call)}")
        if function.get("arguments") in (None, ""):  # of a function that takes none
            function = {**function, "arguments": {}}
        if isinstance(function["arguments"], str):  # OpenAI's form; chat templates print objects
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                function = {**function, "arguments": arguments}
        return {**call, "function": dict(function)} if "function" in call else dict(function)

    def parse_json(self, value: Any, location: str) -> Any:
        """A value that may be stored as JSON text or as a Python literal, without the nulls that Arrow added."""
        if not isinstance(value, str):
            return value if self.keep_nulls else drop_nulls(value)
        parsed = parse_literal(value)
        if parsed is None and value.strip() != "null":
            raise UserError(f"{location} is not JSON: {excerpt(value)}; write it by json.dumps")
        return parsed

    def objects(self, value: Any, location: str) -> list[dict[str, Any]]:
        """A list of objects. The list, or each object, may be JSON text."""
        items = self.parse_json(value, location)
        items = items if isinstance(items, list | tuple) else [items]
        items = [self.parse_json(item, location) if isinstance(item, str) else item for item in items]
        if not all(isinstance(item, Mapping) for item in items):
            raise UserError(f"{location} is {excerpt(value)}; a list of objects, or its JSON text, needed")
        return [dict(item) for item in items]


def excerpt(value: Any, max_length: int = 60) -> str:
    """The start of a value's repr, on one line, for an error message."""
    text = one_line(repr(value), max_length + 1)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def require_utf8(text: str, location: str) -> str:
    """`text` itself. Raises UserError if UTF-8 cannot encode it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = excerpt(text[max(0, error.start - 10) : error.end + 10])
            raise UserError(
                f"{location} holds half of a surrogate pair ({around}), which is no text; mend or remove the row"
            ) from error
    return text


def parse_literal(text: str) -> Any:
    """The value of JSON text or of a Python literal (pandas writes lists so into a CSV); None for any other text."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def parse_messages(text: str) -> list[Any]:
    """The messages in JSON text (or a Python literal) of a list of {role, content}; empty for any other text."""
    is_candidate = text.lstrip().startswith("[") and _HAS_ROLE_KEY.search(text)
    turns = _turns(parse_literal(text)) if is_candidate else []
    return turns if all(map(_has_role_and_content, turns)) else []


def _turns(value: Any) -> list[Any]:
    """The messages in a parsed list, each of which may be JSON text; empty for any other value."""
    items = value if isinstance(value, list) else []
    turns = [parse_literal(item) if isinstance(item, str) else item for item in items]
    return turns if all(map(_is_message, turns)) else []


def _has_role_and_content(turn: Mapping[str, Any]) -> bool:
    return "role" in turn and ("content" in turn or "tool_calls" in turn)


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and (
        _has_role_and_content(turn)
        or ("from" in turn and isinstance(turn.get("value"), str))
        or (
            isinstance(turn.get("text"), str)
            and any(str(turn.get(key)).lower() in ROLE_NAMES for key in ("role", "speaker"))
        )
    )


def _parse_transcript(text: str, *, is_prompt: bool) -> Messages:
    """The turns of a transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's form) or "### Human: ...".

    Empty for any other text. A prompt may end with "Assistant:"; its last, empty turn is left out.
    """
    first = _FIRST_SPEAKER.match(text)
    if not first:
        return []
    marks = list((_HEADED_SPEAKER if first[1] else _SPEAKER).finditer(text))
    if not any(mark[1].lower() == "assistant" for mark in marks):
        return []
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        {"role": ROLE_NAMES[mark[1].lower()], "content": text[mark.end() : stop]}
        for mark, stop in zip(marks, stops, strict=True)
    ]
    if is_prompt and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns
