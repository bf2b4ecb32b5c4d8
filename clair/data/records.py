"""The records of a build: prompts, replies, revisions, judgements and pairs. Their ids are hashes of their content."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from typing import Any, NotRequired, TypedDict

from clair.core.files import content_hash


class Message(TypedDict):
    """One turn of a conversation. Only a turn with tool calls may have None as its content."""

    role: str
    content: str | None
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]


Messages = tuple[Message, ...]


def replace_surrogates(text: str) -> str:
    """`text` with the replacement character for each half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fold_case(text: str) -> str:
    """`text` in lower case, each character by itself, as `re.IGNORECASE` compares it; the length stays the same."""
    if text.isascii():
        return text.lower()
    return text.replace("\u0130", "i").lower().replace("\u0131", "i").replace("\u017f", "s")


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a turn: its content, then its tool calls as JSON."""
    content, calls = message.get("content") or "", message.get("tool_calls")
    if not calls:
        return content
    listed = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
    return f"{content}\n\nTool calls:\n{listed}".lstrip("\n")


Tools = tuple[Mapping[str, Any], ...]
"""Tool definitions in the format of OpenAI's API."""
LABELS = ("user", "group", "behaviour", "source")
"""Optional columns of a pair: the person whose preference it is, their group, the behaviour, and its origin."""
SCORES = ("score_chosen", "score_rejected")
"""Columns of a pair with the scores of its answers."""


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the turn to be answered, with the ready answers of its row, if any.

    `id` is that of the row, or `content_id` if that is empty. Equal content always has the same `content_id`.
    """

    id: str
    messages: Messages
    answer: str | None = None
    answers: tuple[str, ...] = ()
    """Answers of other models, to be judged or compared by `scores`."""
    scores: tuple[float, ...] = ()
    """One score per answer, NaN for an answer without a score; or none at all."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The row's values of the columns `LABELS`, which its pair gets too."""
    tools: Tools = ()
    """The tools that the model may call."""
    stronger: str | None = None
    """A stronger model's ready answer."""
    reference: Any = None
    """What a checker compares answers with: any JSON value."""
    from_json: bool = field(default=False, compare=False)
    """True if the row held the messages as JSON text."""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self.content_id)

    @cached_property
    def content_id(self) -> str:
        """The hash of messages, ready answers, tools and reference: 16 hex digits, the same on every machine."""
        return content_id(
            self.messages, self.answer, self.answers, self.scores, self.tools, self.stronger, self.reference
        )

    @property
    def plain(self) -> bool:
        """True if its turns have only role and text, and there are no tools."""
        return not self.tools and all(len(m) == 2 and isinstance(m["content"], str) for m in self.messages)


def content_id(
    messages: Messages,
    answer: str | None,
    answers: tuple[str, ...] = (),
    scores: tuple[float, ...] = (),
    tools: Tools = (),
    stronger: str | None = None,
    reference: Any = None,
) -> str:
    """The first 16 hex digits of the hash of a conversation, its ready answers, its tools and its reference."""
    answer_values = [answers, scores] if answers else []
    extra = {name: value for name, value in (("tools", tools), ("stronger", stronger)) if value}
    extra |= {} if reference is None else {"reference": reference}
    return content_hash([list(messages), answer, *answer_values, *([extra] if extra else [])])[:16]


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply of a model to one request. Hidden reasoning (`thinking`) is separate from the answer (`text`).

    `finish_reason` is the server's ("stop", "length", ...), or None if it gave none. It is "refusal" if the reply has
    no text but a refusal in a field of its own, whose text is `refusal`. `usage` counts tokens (prompt_tokens,
    completion_tokens); it is empty if the server gave none.
    """

    text: str
    thinking: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    model: str = ""
    refusal: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def incomplete(self, *, tools: bool = False) -> str | None:
        """The reason of `incomplete_reason` if the text is not a whole answer, or None."""
        return incomplete_reason(self.finish_reason, tools=tools)


_GOOD_ENDINGS = {"", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "complete", "completed"}
_TOOL_ENDINGS = {"tool_calls", "tool_call", "tool_use", "function_call"}
_BAD_ENDINGS = {
    "tool_call": re.compile("|".join(_TOOL_ENDINGS)),
    "refusal": re.compile("refusal"),
    "content_filter": re.compile(
        "content_?filter|content_blocked|moderat|safety|recitation|blocklist|prohibited|spii|sensitive|guardrail|policy|toxic"
    ),
    "truncated": re.compile(
        "length|max_(?:new_|output_|completion_)?tokens?|token_limit|(?:error|context|tokens?)_limit|context_window|truncated"
    ),
    "server_error": re.compile(
        "error|abort|cancel|time_?out|overload|insufficient_system_resource|unavailable|preempt"
    ),
}
"""Patterns of bad endings by their reason. The first match decides."""


@lru_cache(maxsize=256)
def incomplete_reason(finish_reason: str | None, *, tools: bool = False) -> str | None:
    """Classify a finish reason: None for a good ending or no finish reason, else why the answer is not whole.

    The reasons are `truncated`, `content_filter`, `refusal`, `tool_call`, `server_error` (worth another attempt), and
    `incomplete` for an unknown finish reason, because only known endings are good. With `tools`, a tool call is a good
    ending.
    """
    snake_case = re.sub(r"([a-z])([A-Z])", r"\1_\2", (finish_reason or "").strip())  # `maxTokens`
    ending = re.sub(r"[\W_]+", "_", snake_case).lower().removeprefix("finish_reason_")
    if ending in _GOOD_ENDINGS or (tools and ending in _TOOL_ENDINGS):
        return None
    return next((reason for reason, pattern in _BAD_ENDINGS.items() if pattern.search(ending)), "incomplete")


def trimmed(text: str) -> str:
    """An answer without blank lines before it and white space after it. The first line keeps its indentation.

    A single leading space is removed, because tokenizers add it.
    """
    text = text.rstrip()
    text = text[text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1 :]
    return text[1:] if text[:1] == " " and not text[1].isspace() else text


def written_like(text: str, answer: str) -> str:
    """A revision with the line ends and the first indentation of the answer, which no reviser means to change.

    `text` has the line ends `\\n`. A line that is in both texts keeps its line end; any other gets the more frequent
    one of the answer.
    """
    text = trimmed(text) if trimmed(answer)[:1].isspace() else text.strip()
    line_ends = re.findall(r"\r?\n", answer)
    if "\r\n" not in line_ends:
        return text
    default_end = "\r\n" if 2 * line_ends.count("\r\n") >= len(line_ends) else "\n"
    lines = text.split("\n")
    new_ends = [default_end] * len(lines)
    if len(set(line_ends)) > 1:
        old = re.split(r"\r?\n", answer)
        for start, new_start, size in SequenceMatcher(None, old, lines, autojunk=False).get_matching_blocks():
            new_ends[new_start : new_start + size] = [*line_ends, default_end][start : start + size]
    return "".join(line + end for line, end in zip(lines, [*new_ends[: len(lines) - 1], ""], strict=True))


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt: its text, its tool calls, and its thoughts, if they are trained."""

    text: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    thinking: str = ""

    def message(self) -> dict[str, Any]:
        """The answer as a turn of the conversation."""
        thoughts = {"reasoning_content": self.thinking} if self.thinking else {}
        calls = {"tool_calls": [dict(call) for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **thoughts, **calls}


@dataclass(frozen=True, slots=True)
class Revision:
    """A parsed revision: the reviser's reasoning and the improved answer, with its tool calls if they were revised."""

    reasoning: str
    answer: str
    tool_calls: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's verdict on two answers: its reasoning, and the number of the better one (1 or 2; 0 for a tie)."""

    reasoning: str
    better: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair: two answers to one prompt, with their models, contrast, labels and scores."""

    id: str
    messages: Messages
    chosen: str
    rejected: str
    reasoning: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    contrast: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    scores: tuple[float, float] | None = None
    """A judge's or reward model's scores of chosen and rejected, if any."""
    tools: Tools = ()
    tool_calls: tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]] = ((), ())
    """The tool calls of chosen and of rejected."""
    thinking: tuple[str, str] = ("", "")
    """The thoughts of chosen and of rejected."""

    @property
    def compared(self) -> tuple[str, str]:
        """The texts of chosen and rejected that are compared: with their tool calls if these differ."""
        if self.tool_calls[0] == self.tool_calls[1]:
            return self.chosen, self.rejected
        chosen, rejected = (
            message_text({"content": text, "tool_calls": list(calls)})
            for text, calls in zip((self.chosen, self.rejected), self.tool_calls, strict=True)
        )
        return chosen, rejected

    def row(self) -> dict[str, Any]:
        """The pair as a row of the dataset: TRL's explicit-prompt conversational preference format."""
        return {
            "id": self.id,
            "prompt": [dict(m) for m in self.messages],
            "chosen": [Answer(self.chosen, self.tool_calls[0], self.thinking[0]).message()],
            "rejected": [Answer(self.rejected, self.tool_calls[1], self.thinking[1]).message()],
            "reasoning": self.reasoning,
            "models": dict(self.models),
            "contrast": dict(self.contrast),
            "score_chosen": self.scores and self.scores[0],
            "score_rejected": self.scores and self.scores[1],
            **{name: self.labels.get(name) for name in LABELS},
            **({"tools": [dict(tool) for tool in self.tools]} if self.tools else {}),
        }


class Dropped(Exception):
    """Raised when a prompt gives no pair: the stage, a reason from a closed list, and a detail for readers.

    `failed` marks a request without a reply, which is worth another attempt, as opposed to a reply or pair that was not
    good enough.
    """

    def __init__(self, stage: str, reason: str, detail: str = "", *, failed: bool = False) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason
        self.detail = detail
        self.failed = failed

    def row(self, prompt_id: str) -> dict[str, Any]:
        """The line of dropped.jsonl."""
        detail = self.detail if len(self.detail) <= 500 else self.detail[:499] + "…"
        return {"id": prompt_id, "stage": self.stage, "reason": self.reason, "detail": detail, "failed": self.failed}


def task_text(messages: Messages, tools: Tools = ()) -> str:
    """A conversation as the text of one task: the text of a single user turn, else all turns under their roles.

    It includes the tools, and the names, tool calls and hidden reasoning of the turns.
    """
    if len(messages) == 1 and messages[0]["role"] == "user" and not tools:
        return message_text(messages[0])
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return "\n\n".join([*([f"Tools:\n{listed}"] if tools else []), *map(_turn_text, messages)])


def _turn_text(message: Message) -> str:
    names = ", ".join(name for name in (message.get("name"), message.get("tool_call_id")) if name)
    reasoning = message.get("reasoning_content")
    hidden = f"Reasoning:\n{reasoning}\n\n" if reasoning else ""
    return f"{message['role'].capitalize()}{f' ({names})' if names else ''}:\n{hidden}{message_text(message)}"
