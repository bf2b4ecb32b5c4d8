"""The records that flow through a build: frozen, small, and named by the hash of what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, NotRequired, TypedDict

from clair.core.files import content_hash


class Message(TypedDict):
    """One turn of a conversation. Only a turn with tool calls may have None for its content."""

    role: str
    content: str | None
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]


Messages = tuple[Message, ...]


def message_text(message: Mapping[str, Any]) -> str:
    """All that a turn says, as text: its content, then its tool calls as JSON."""
    content, calls = message.get("content") or "", message.get("tool_calls")
    if not calls:
        return content
    listed = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
    return f"{content}\n\nTool calls:\n{listed}".lstrip("\n")


Tools = tuple[Mapping[str, Any], ...]
"""Definitions of tools, as OpenAI's API takes them."""
LABELS = ("user", "group", "behaviour", "source")
"""Optional columns of a pair: whose preference it is, of which group they are, what it is about, how it was made."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to the turn that is to be answered, with a ready answer where the user has one.

    `id` is the user's own, or the hash of the content; equal content always has the equal `content_id`.
    """

    id: str
    messages: Messages
    answer: str | None = None
    answers: tuple[str, ...] = ()
    """Answers of other models, to be judged or with `scores`, one each; NaN for an answer that has none."""
    scores: tuple[float, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the row says under the names of `LABELS`; handed on to its pair."""
    tools: Tools = ()
    """The tools that the model may call."""
    stronger: str | None = None
    """A stronger model's ready answer."""

    @property
    def content_id(self) -> str:
        """Hash of the messages, all ready answers and the tools: 16 hex digits, the same on every machine."""
        return content_id(self.messages, self.answer, self.answers, self.scores, self.tools, self.stronger)

    @property
    def plain(self) -> bool:
        """Whether its turns are only role and text, and there are no tools."""
        return not self.tools and all(len(m) == 2 and isinstance(m["content"], str) for m in self.messages)


def content_id(
    messages: Messages,
    answer: str | None,
    answers: tuple[str, ...] = (),
    scores: tuple[float, ...] = (),
    tools: Tools = (),
    stronger: str | None = None,
) -> str:
    """The first 16 hex digits of the hash of a conversation, its ready answers and its tools."""
    ready = [answers, scores] if answers else []
    more = {name: value for name, value in (("tools", tools), ("stronger", stronger)) if value}
    return content_hash([list(messages), answer, *ready, *([more] if more else [])])[:16]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said to one request, hidden reasoning kept apart from the answer.

    `finish_reason` is the server's ("stop", "length", ...), None where it gave none, and "refusal" where there is no
    text but a refusal in a field of its own, whose words are `refusal`. `usage` counts tokens (prompt_tokens,
    completion_tokens), empty where the server did not tell.
    """

    text: str
    thinking: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    model: str = ""
    refusal: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def incomplete(self, *, tools: bool = False) -> str | None:
        """Why the text is not a whole answer, as `incomplete_reason` says it; None for a whole one."""
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
"""Patterns of bad endings, by the reason to tell, the first that is found."""


def incomplete_reason(finish_reason: str | None, *, tools: bool = False) -> str | None:
    """Why a reply with this finish reason is not a whole answer; None for a good ending, or where there is no reason.

    One of `truncated`, `content_filter`, `refusal`, `tool_call`, `server_error` (worth another try), and `incomplete`
    for a reason that nobody knows: only known endings are good. `tools`: the request has tools, and calling one ends
    an answer well.
    """
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", (finish_reason or "").strip())  # `maxTokens`
    ending = re.sub(r"[\W_]+", "_", words).lower().removeprefix("finish_reason_")
    if ending in _GOOD_ENDINGS or (tools and ending in _TOOL_ENDINGS):
        return None
    return next((reason for reason, pattern in _BAD_ENDINGS.items() if pattern.search(ending)), "incomplete")


def trimmed(text: str) -> str:
    """An answer without blank lines before it and white space behind it. Its first line stays as far to the right.

    One space before it goes: tokenizers put it there.
    """
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())
    return text[1:] if re.match(r" \S", text) else text


def written_like(text: str, answer: str) -> str:
    """A revision with the form of the answer that no reviser means to change: its line ends, its first indentation.

    `text` has the line ends `\\n`. A line that stands in both keeps its own line end, another gets the usual one.
    """
    text = trimmed(text) if trimmed(answer)[:1].isspace() else text.strip()
    ends = re.findall(r"\r?\n", answer)
    if "\r\n" not in ends:
        return text
    usual = "\r\n" if 2 * ends.count("\r\n") >= len(ends) else "\n"
    lines = text.split("\n")
    found = [usual] * len(lines)
    if len(set(ends)) > 1:
        old = re.split(r"\r?\n", answer)
        for start, at, size in SequenceMatcher(None, old, lines, autojunk=False).get_matching_blocks():
            found[at : at + size] = [*ends, usual][start : start + size]
    return "".join(line + end for line, end in zip(lines, [*found[: len(lines) - 1], ""], strict=True))


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt: its text, and the tools that it calls."""

    text: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def message(self) -> dict[str, Any]:
        """The answer as a turn of the conversation."""
        calls = {"tool_calls": [dict(call) for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}


@dataclass(frozen=True, slots=True)
class Revision:
    """A parsed revision: the reviser's reasoning and the improved answer."""

    reasoning: str
    answer: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's choice between two answers: its reasoning, and which is better (1 or 2; 0 for a tie)."""

    reasoning: str
    better: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair: two answers to one prompt, and how they came about."""

    id: str
    messages: Messages
    chosen: str
    rejected: str
    reasoning: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    contrast: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    scores: tuple[float, float] | None = None
    """A judge's or reward model's scores of chosen and rejected, where there are any."""
    tools: Tools = ()
    tool_calls: tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]] = ((), ())
    """The tools that chosen and rejected call."""

    def row(self) -> dict[str, Any]:
        """The pair as a row of the dataset: TRL's explicit-prompt conversational preference format."""
        return {
            "id": self.id,
            "prompt": [dict(m) for m in self.messages],
            "chosen": [Answer(self.chosen, self.tool_calls[0]).message()],
            "rejected": [Answer(self.rejected, self.tool_calls[1]).message()],
            "reasoning": self.reasoning,
            "models": dict(self.models),
            "contrast": dict(self.contrast),
            "score_chosen": self.scores and self.scores[0],
            "score_rejected": self.scores and self.scores[1],
            **{name: self.labels.get(name) for name in LABELS},
            **({"tools": [dict(tool) for tool in self.tools]} if self.tools else {}),
        }


class Dropped(Exception):
    """Why a prompt gives no pair: the stage it ended at, a reason from a closed list, and a detail to read.

    `failed` tells a request that got no reply (worth another try) from a reply or pair that was not good enough.
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
    """A conversation as one task: the bare text of a lone user turn, else the turns under their roles.

    Whatever else it has is told too: the tools, names, tool calls and hidden reasoning.
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
