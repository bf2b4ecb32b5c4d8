"""One protocol, several ways to ask a model: any OpenAI-compatible endpoint, or a local transformers model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from clair.recipe import UserError
from clair.records import Reply, incomplete_reason


class Model(Protocol):
    """A model that can be asked. `request` is the body of a chat completion, without the model's name."""

    name: str
    identity: str
    """What a reply belongs to: weights hash, `id:` of the recipe, or model name and base URL."""

    async def check(self) -> None:
        """See that the model is there and may be asked, before anything is spent. Raises Refused."""

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """The raw JSON text of a chat completion. Raises Refused, RequestFailed, TooMany or Unreachable.

        `sample` tells equal requests apart that want different answers; an endpoint draws anew by itself.
        """

    async def close(self) -> None:
        """Let connections or weights go."""


class Refused(UserError):
    """The endpoint refuses every request: wrong key, unknown model, no quota left. The run stops at once."""


class RequestFailed(Exception):
    """The endpoint refuses this one request, for good; the others may go on."""

    def __init__(self, reason: str, detail: str, raw: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.raw = raw


class TooMany(Exception):
    """429: asked too often or too much at once. `retry_after` is in seconds, None where the server gave none."""

    def __init__(self, retry_after: float | None) -> None:
        super().__init__("429")
        self.retry_after = retry_after


class Unreachable(Exception):
    """A server error, a timeout or a broken connection: worth another try.

    `billed`: the request may have been answered and paid for, only the reply did not arrive. `timeout`: the server
    took too long. `waiting`: it took no connection while it answered other requests, which is no failure.
    """

    def __init__(self, told: str, *, billed: bool = False, timeout: bool = False, waiting: bool = False) -> None:
        super().__init__(told)
        self.billed = billed
        self.timeout = timeout
        self.waiting = waiting


def reply_of(raw: str, *, tools: bool = False) -> Reply:
    """The reply in the raw JSON text of a chat completion. Raises RequestFailed where there is none.

    `tools`: the request has tools, so that a reply may call one.
    Hidden reasoning (`reasoning_content`, `reasoning`, or a leading `<think>` part) is kept apart from the answer.
    """
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content")
        finish = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise RequestFailed("malformed_reply", f"the reply is no chat completion: {raw[:200]!r}", raw) from error
    if isinstance(content, list):  # content parts, as some servers send them
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict) and p.get("type") == "text")
    calls = message.get("tool_calls")
    calls = tuple(calls) if isinstance(calls, list) and all(isinstance(call, dict) for call in calls) else ()
    if message.get("tool_calls") and not (content or (tools and calls)):
        raise RequestFailed("tool_call", "the reply calls a tool and says nothing", raw)
    hidden = message.get("reasoning_content") or message.get("reasoning") or ""
    thinking, text = split_thinking(content if isinstance(content, str) else "")
    finish = None if finish is None else str(finish)
    if incomplete_reason(finish) == "server_error":
        raise RequestFailed("server_error", f"the server broke off: finish_reason {finish!r}", raw)
    refusal = message.get("refusal")
    refusal = encodable(refusal) if isinstance(refusal, str) and not text.strip() else ""
    return Reply(
        text=encodable(text),
        thinking=encodable(thinking or (hidden if isinstance(hidden, str) else "")),
        finish_reason="refusal" if refusal else finish,
        refusal=refusal,
        tool_calls=calls,
        usage=_usage(body.get("usage")),
        model=str(body.get("model") or ""),
    )


def split_thinking(text: str) -> tuple[str, str]:
    """(hidden reasoning, answer) of a text that may begin with `<think> ... </think>`; never closed: all hidden."""
    start = text.lstrip()
    if start.startswith("<think>"):
        thinking, _, answer = start.removeprefix("<think>").partition("</think>")
        return thinking.strip(), answer.lstrip()
    if "</think>" in text and "<think>" not in text:  # the template opened it for the model
        thinking, _, answer = text.partition("</think>")
        return thinking.strip(), answer.lstrip()
    return "", text


def encodable(text: str) -> str:
    """Half of a surrogate pair, which JSON can carry and UTF-8 cannot, becomes the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _usage(usage: object) -> dict[str, int]:
    if not isinstance(usage, dict):
        return {}
    numbers = {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")}
    # Servers send null, NaN and worse; a number that no request can have is as good as none.
    return {k: int(v) for k, v in numbers.items() if isinstance(v, int | float) and 0 <= v < 1e9}


def as_completion(text: str, finish_reason: str, model: str, prompt_tokens: int, completion_tokens: int) -> str:
    """The raw JSON text of a chat completion that was made in this process."""
    return json.dumps(
        {
            "object": "chat.completion",
            "model": model,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
            ],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
        },
        ensure_ascii=False,
    )
