"""The texts of messages and tools, to check that a chat template has written all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from clair.data.records import message_text

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold its thoughts."""
_CHECKED_KEYS = ("role", "content", "tool_calls", *THOUGHTS)
_SCORE_WORDS = ("score", "rating", "rationale")
_END_THOUGHT = re.compile(r"</think>|\[/THINK\]")
_START_THOUGHT = re.compile(r"<think>|\[THINK\]")
_BLANKS = re.compile(r"\s+|\\[nrt]|\\(?=[\"'\\/])")


def each_text(value: Any) -> Iterator[str]:
    """Every text in messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from each_text(item)


def answer_text(answer: str | Sequence[Mapping[str, Any]]) -> str:
    """The last turn of an answer as text, with its tool calls; a dataset of plain text has answers that are text."""
    return answer if isinstance(answer, str) else message_text(answer[-1])


def is_extra_text(key: str) -> bool:
    """True for a key of a message that is not checked separately, and is no id or score."""
    return key not in _CHECKED_KEYS and not key.endswith("id") and not any(word in key for word in _SCORE_WORDS)


def tool_texts(value: Any) -> list[str]:
    """Names and descriptions of tools and of their parameters. Types are excluded: templates rename them."""
    if isinstance(value, list | tuple):
        return [text for item in value for text in tool_texts(item)]
    if not isinstance(value, Mapping):
        return []
    texts = [item for key in ("name", "description") if isinstance(item := value.get(key), str)]
    properties = value.get("properties")
    if isinstance(properties, Mapping):
        texts += properties
    return texts + [text for item in value.values() for text in tool_texts(item)]


def with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as JSON text."""

    def written(function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**function, "arguments": text}

    calls = [
        {**call, "function": written(call["function"])} if "function" in call else written(call)
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def call_texts(message: Mapping[str, Any]) -> list[str]:
    """Names and arguments of a message's tool calls, as the texts that a template must write."""
    texts = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments")
        with suppress(ValueError):  # text that is no JSON is checked as it is
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        texts += [function["name"], *_values(arguments)]
    return texts


def _values(value: Any) -> list[str]:
    """Keys and values of a tool call's arguments as text."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *_values(item))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _values(item)]
    return [value] if isinstance(value, str) else [json.dumps(value)] if type(value) in (int, float) else []


def split_thoughts(message: Mapping[str, Any]) -> tuple[list[str], str]:
    """The thoughts of a message, from their own keys or from its text, and the remaining text."""
    thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
    content = message["content"]
    if message["role"] == "assistant" and (marks := [*_END_THOUGHT.finditer(content)]):
        thoughts.append(_START_THOUGHT.sub("", content[: marks[-1].start()]))
        content = content[marks[-1].end() :]
    return thoughts, content


def with_thoughts_in_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the thoughts of its own keys at the start of its text, between `<think>` marks."""
    thoughts = [message[key].strip() for key in THOUGHTS if isinstance(message.get(key), str) and message[key].strip()]
    if not thoughts:
        return message
    others = {key: value for key, value in message.items() if key not in THOUGHTS}
    return {**others, "content": f"<think>\n{thoughts[0]}\n</think>\n{message['content']}"}


def contains_all(text: str, pieces: Sequence[str]) -> bool:
    """True if a rendered text contains all pieces: unchanged, trimmed, or as JSON writes them."""
    squeezed = None
    for piece in pieces:
        piece = piece.strip()
        if piece in text:
            continue
        if squeezed is None:
            squeezed = _BLANKS.sub("", text)
        forms = (piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1], _escaped_for_html(piece))
        if not any(_BLANKS.sub("", form) in squeezed for form in forms):
            return False
    return True


def _escaped_for_html(text: str) -> str:
    """The text as Jinja's `tojson` writes it."""
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "'": "\\u0027"}
    return "".join(escapes.get(letter, letter) for letter in json.dumps(text)[1:-1])
