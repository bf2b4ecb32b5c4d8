"""Is what a URL serves the model that we think it is: template, end of turn, truncation, logprobs, speed.

A wrong chat template or stop token does not fail: it makes worse answers, silently. So a few short requests are sent
and compared with what the model's own tokenizer says.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, one_line
from clair.core.urls import api_key, parse_endpoint
from clair.data.records import incomplete_reason
from clair.inference.model import RequestFailed, TooMany, Unreachable
from clair.inference.openai import NotListed, OpenAIModel

_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."},
     {"role": "user", "content": "And another one?"}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is two and two?"}],
)  # fmt: skip
_AT_ONCE = 8
_SPEED_TOKENS = 64
_TURN_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: `ok` is None where it could not be told, or does not matter for building pairs."""

    name: str
    ok: bool | None
    told: str


def check_endpoints(
    urls: Sequence[str],
    tokenizer: str | Path | None = None,
    *,
    model: str | None = None,
    key_env: str | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Check]]:
    """The checks of each endpoint, by URL. Raises UserError where one cannot be asked at all.

    `on_step` gets what is looked at next, in words.
    """
    for url in urls:
        try:
            parse_endpoint(url)
        except ValueError as error:
            raise UserError(str(error)) from error
    loaded = _load(tokenizer) if tokenizer else None
    key = api_key(key_env, "check-endpoint")
    return asyncio.run(_check_all(list(dict.fromkeys(urls)), loaded, model, key, on_step))


def _load(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        words = one_line(error)
        raise UserError(f"--tokenizer {path}: no tokenizer can be loaded from it ({words})") from error
    if not tokenizer.chat_template:
        raise UserError(f"--tokenizer {path} has no chat template; give the tokenizer of the chat model that is served")
    return tokenizer


async def _check_all(
    urls: Sequence[str], tokenizer: Any, model: str | None, key: str | None, on_step: Callable[[str], None]
) -> dict[str, list[Check]]:
    return {parse_endpoint(url).base: await _check(url, tokenizer, model, key, on_step) for url in urls}


async def _check(
    url: str, tokenizer: Any, model: str | None, key: str | None, on_step: Callable[[str], None]
) -> list[Check]:
    asked = OpenAIModel(url, model or "", key=key, timeout=120.0, role="check-endpoint")
    try:
        on_step(f"{asked.url}: which model is served")
        asked.name = model or await _only_model(asked)
        try:
            await asked.check()
        except Unreachable as error:
            raise UserError(f"{asked.url} is not ready ({error}); try again when it is") from error
        checks = [Check("model", True, asked.name)]
        for name, check in (
            ("chat template", partial(_template, asked, tokenizer)),
            ("end of turn", partial(_end_of_turn, asked, tokenizer)),
            ("truncation", partial(_truncation, asked)),
            ("logprobs", partial(_logprobs, asked)),
            (f"speed, {_AT_ONCE} requests at once", partial(_speed, asked)),
        ):
            on_step(f"{asked.url}: {name}")
            checks.append(await check())
        return checks
    finally:
        await asked.close()


async def _only_model(asked: OpenAIModel) -> str:
    try:
        listed = await asked.call(lambda client: client.models.list())
        names = [str(entry.id) for entry in listed.data or []]
    except (RequestFailed, NotListed, TooMany, Unreachable, AttributeError, TypeError) as error:
        raise UserError(f"{asked.url} does not list its models ({error}); name one with --model") from error
    if len(names) != 1:
        raise UserError(f"{asked.url} serves {', '.join(names) or 'no model'}; name one with --model")
    return names[0]


async def _ask(asked: OpenAIModel, messages: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
    """The body of a chat completion, or `{"error": words}`."""
    try:
        raw = await asked.complete({"messages": list(messages), "temperature": 0.0, **options})
    except (RequestFailed, TooMany, Unreachable) as error:
        return {"error": str(error)}
    try:
        body = json.loads(raw)
        body["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return {"error": f"no chat completion: {raw[:80]!r}"}
    return dict(body)


def _usage(body: Mapping[str, Any], name: str) -> int | None:
    usage = body.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None


async def _template(asked: OpenAIModel, tokenizer: Any) -> Check:
    """The server counts as many tokens in a prompt as the tokenizer's template gives: very likely the same one."""
    name = "chat template"
    if tokenizer is None:
        return Check(name, None, "not compared: give --tokenizer")
    for messages in _CONVERSATIONS:
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        except Exception as error:  # templates raise what they like: one that takes no system prompt
            if messages is _CONVERSATIONS[-1]:
                return Check(name, True, f"as the tokenizer's, which takes no system prompt ({error})"[:120])
            raise
        body = await _ask(asked, messages, max_tokens=1)
        if "error" in body:
            return Check(name, False, f"a conversation of {len(messages)} turns is refused: {body['error']}"[:200])
        counted = _usage(body, "prompt_tokens")
        if counted is None:
            return Check(name, None, "the server does not tell how many tokens a prompt has")
        if counted != len(ids):
            told = f"{counted} tokens at the server, {len(ids)} by the tokenizer's template"
            return Check(name, False, f"{told}, for {messages[-1]['content']!r}")
    return Check(name, True, f"as many tokens as the tokenizer's, {len(_CONVERSATIONS)} conversations")


async def _end_of_turn(asked: OpenAIModel, tokenizer: Any) -> Check:
    """An answer ends by itself, and no special token is in it."""
    name = "end of turn"
    body = await _ask(asked, _CONVERSATIONS[0], max_tokens=_TURN_TOKENS)
    if "error" in body:
        return Check(name, False, str(body["error"])[:200])
    text = str(body["choices"][0]["message"].get("content") or "")
    special = sorted(token for token in getattr(tokenizer, "all_special_tokens", ()) if token in text)
    if special:
        return Check(name, False, f"{special[0]} stands in the answer: it is no stop token at the server")
    finish = body["choices"][0].get("finish_reason")
    if finish is None or incomplete_reason(str(finish)):
        return Check(name, None, f"the answer to 'Hello' did not end within {_TURN_TOKENS} tokens")
    return Check(name, True, "the answer ends by itself, without a special token in it")


async def _truncation(asked: OpenAIModel) -> Check:
    """An answer that is cut off is told as such: else half an answer would become a loser or a winner."""
    body = await _ask(asked, [{"role": "user", "content": "Count from one to fifty, in words."}], max_tokens=2)
    if "error" in body:
        return Check("truncation", False, str(body["error"])[:200])
    finish, tokens = body["choices"][0].get("finish_reason"), _usage(body, "completion_tokens")
    if incomplete_reason(finish and str(finish)) == "truncated":
        return Check("truncation", True, f"told as finish_reason {finish}")
    if tokens is not None and tokens < 2:
        return Check("truncation", None, f"the answer ended after {tokens} tokens")
    return Check("truncation", False, f"max_tokens 2, and finish_reason {finish!r} after {tokens} tokens")


async def _logprobs(asked: OpenAIModel) -> Check:
    body = await _ask(asked, _CONVERSATIONS[0], max_tokens=2, logprobs=True, top_logprobs=1)
    found = None if "error" in body else body["choices"][0].get("logprobs")
    content = found.get("content") if isinstance(found, dict) else None
    return Check("logprobs", True, "available") if content else Check("logprobs", None, "not available")


async def _speed(asked: OpenAIModel) -> Check:
    started = time.monotonic()
    asks = ([{"role": "user", "content": f"Tell me a story about the number {n}."}] for n in range(_AT_ONCE))
    bodies = await asyncio.gather(*(_ask(asked, messages, max_tokens=_SPEED_TOKENS) for messages in asks))
    counts = [_usage(body, "completion_tokens") for body in bodies]
    if None in counts:
        return Check("tokens a second", None, next((b["error"] for b in bodies if "error" in b), "usage is not told"))
    total = sum(count or 0 for count in counts)
    seconds = time.monotonic() - started
    return Check("tokens a second", True, f"{total / seconds:.0f} with {_AT_ONCE} requests at once")
