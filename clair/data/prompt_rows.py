"""Read one row of a prompt source as a `Prompt`: messages, ready answers, scores, tools and labels.

Every function raises UserError with the location of a row that cannot be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from clair.core.errors import UserError, near_miss
from clair.data.message_reader import parse_messages
from clair.data.records import LABELS, Message, Messages, Prompt, Tools, replace_surrogates
from clair.data.row_formats import ROLES

_MESSAGE_KEYS = {"name": str, "tool_calls": list, "tool_call_id": str, "reasoning_content": str}
"""The keys that a message may have beside role and content, and their types."""
_SCORE_KEYS = ("score", "overall_score", "rating")


def read_prompt(row: Any, names: Mapping[str, str], location: str) -> Prompt:
    """The prompt in a row. `names` maps our name of each column that is read to that of the source."""
    if not isinstance(row, Mapping):
        raise UserError(f"{location}: {type(row).__name__}, not an object with a {names['prompt']!r} field")
    if names["prompt"] not in row:
        raise UserError(
            f"{location}: no column {names['prompt']!r}{near_miss(names['prompt'], row)}; columns found: "
            f"{', '.join(map(str, row)) or 'none'}; name yours under prompts.columns"
        )
    cells = {name: row.get(column) for name, column in names.items()}
    prompt = cells["prompt"]
    turns = parse_messages(prompt) if isinstance(prompt, str) else []
    messages = _messages(turns or prompt, location)
    answer, stronger = _answer(cells.get("answer"), location), _answer(cells.get("stronger"), location)
    answers, scores = _answers(cells, location)
    reference = _json_value(cells.get("reference"), f"{location}: {names.get('reference')}")
    tools = _tools(cells.get("tools"), names.get("tools", ""), location)
    labels = {name: _label(cells[name], names[name], location) for name in LABELS if cells.get(name) is not None}
    id = cells.get("id")
    id = "" if id is None else replace_surrogates(str(id))
    return Prompt(id, messages, answer, answers, scores, labels, tools, stronger, reference, bool(turns))


def _tools(value: Any, column: str, location: str) -> Tools:
    """Tool definitions: a list of them, or that list as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: {column} is text that is no JSON ({error}); give a list of tools") from error
    if value is None or value == "" or value == []:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{location}: {column} is {type(value).__name__}, not a list of tool definitions")
    return tuple(_json_value(tool, f"{location}: {column}") for tool in value)


def _label(value: Any, column: str, location: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(
            f"{location}: {column} is {value!r}, not text or a whole number; name another column, or null, under "
            f"prompts.columns"
        )
    return replace_surrogates(str(value))


def _messages(value: Any, location: str) -> Messages:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{location}: the prompt is empty; every row needs text")
        return ({"role": "user", "content": replace_surrogates(value)},)
    turns = list(value) if isinstance(value, list | tuple) or hasattr(value, "tolist") else []
    if not turns:
        raise UserError(f"{location}: the prompt is {type(value).__name__}, not text or a list of messages")
    messages = tuple(_message(turn, location) for turn in turns)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{location}: the prompt ends with an assistant turn; move its text to the answer column")
    return messages


def _message(turn: Any, location: str) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    content = _join_text_items(content)
    calls = role in ROLES and isinstance(turn.get("tool_calls"), list) and turn["tool_calls"]
    if role not in ROLES or not (isinstance(content, str) or (content is None and calls)):
        raise UserError(
            f"{location}: a message of the prompt is not {{role, content}} with text content and a role of "
            f"{', '.join(ROLES)}"
        )
    extra = {
        key: value for key, value in turn.items() if key not in ("role", "content") and value not in (None, "", [])
    }
    for key, value in extra.items():
        kind = _MESSAGE_KEYS.get(key)
        if kind is None:
            allowed = ", ".join(("role", "content", *_MESSAGE_KEYS))
            raise UserError(
                f"{location}: a message of the prompt has the key {key!r}, which no model is sent; remove it "
                f"(allowed: {allowed})"
            )
        if not isinstance(value, kind):
            raise UserError(f"{location}: {key} of a message is {type(value).__name__}, not {kind.__name__}")
        extra[key] = _json_value(value, f"{location}: {key} of a message")
    text = content if content is None else replace_surrogates(content)
    return cast("Message", {"role": role, "content": text, **extra})


def _join_text_items(content: Any) -> Any:
    """A content list joined to one text if all of its items are text; any other content unchanged."""
    items = list(content) if isinstance(content, list | tuple) else []
    texts = [item.get("text") for item in items if isinstance(item, Mapping) and item.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if items and len(strings) == len(items) else content


def _answer(value: Any, location: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        if value[0].get("tool_calls"):
            raise UserError(f"{location}: the answer calls a tool; only text can be compared or revised")
        return _answer(_join_text_items(value[0].get("content")), location)  # one assistant message
    raise UserError(f"{location}: the answer is {type(value).__name__}, not text")


def _answers(cells: Mapping[str, Any], location: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Several ready answers and their scores: two lists, or UltraFeedback's `completions` (response, overall_score).

    A missing score (null, NaN, infinite) becomes NaN. If all scores are missing, there are none.
    """
    entries = cells.get("answers") or cells.get("completions") or []
    scores = cells.get("scores")
    if not isinstance(entries, list | tuple) or (scores is not None and not isinstance(scores, list | tuple)):
        raise UserError(f"{location}: answers and scores must be lists, one score an answer")
    if entries and isinstance(entries[0], Mapping):
        scores = [next((e[key] for key in _SCORE_KEYS if e.get(key) is not None), None) for e in entries]
        entries = [entry.get("response", entry.get("content", entry.get("text"))) for entry in entries]
    if any(not isinstance(entry, str) for entry in entries):
        raise UserError(f"{location}: an entry of answers is not text")
    if len(entries) == 1:
        raise UserError(
            f"{location}: only one entry in answers; a comparison needs two (a lone answer goes to `answer`)"
        )
    if scores is not None and len(scores) != len(entries):
        raise UserError(f"{location}: {len(entries)} answers but {len(scores)} scores; give one score an answer")
    try:
        numbers = [math.nan if score is None else float(score) for score in scores or ()]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{location}: a score is not a number ({error}); give numbers below 1e308, or null for a missing one"
        ) from error
    finite = [number if math.isfinite(number) else math.nan for number in numbers]
    return tuple(map(replace_surrogates, entries)), () if all(map(math.isnan, finite)) else tuple(finite)


def _json_value(value: Any, location: str) -> Any:
    """A JSON value with `replace_surrogates` applied to each of its texts. Raises UserError for any other value."""
    if isinstance(value, Mapping):
        return {key: _json_value(inner, location) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner, location) for inner in value]
    if isinstance(value, str):
        return replace_surrogates(value)
    if value is not None and not isinstance(value, bool | int | float):
        raise UserError(
            f"{location} holds a {type(value).__name__}; allowed: text, numbers, true, false, null, lists and objects; "
            f"store it as text"
        )
    return value
