"""Check that an endpoint serves a model correctly: chat template, end of turn, truncation, logprobs, speed.

A wrong chat template or stop token raises no error and silently makes answers worse. So a few short requests are sent,
and the replies are compared with the model's tokenizer.
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

from clair.core.errors import UserError
from clair.core.urls import api_key, parse_endpoint
from clair.data.records import incomplete_reason
from clair.inference.model import RateLimited, RequestFailed, Unreachable
from clair.inference.model_folder import load_tokenizer, unknown_variable
from clair.inference.openai import NotFound, OpenAIModel

_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And another one?"},
    ],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is two and two?"}],
)
_SPEED_REQUESTS = 8
_SPEED_TOKENS = 64
_TURN_TOKENS = 256


_MAX_MESSAGE = 200
_REQUIRED = ("chat template", "end of turn", "truncation")
"""Checks that fail if their request gets no answer; the others are then undecided."""
CheckResult = tuple[bool | None, str]
"""`ok` and the message of a `Check`."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check: `ok` is None if it cannot be decided, or does not matter for building pairs."""

    name: str
    ok: bool | None
    message: str


def check_endpoints(
    urls: Sequence[str],
    tokenizer: str | Path | None = None,
    *,
    model: str | None = None,
    key_env: str | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Check]]:
    """Check endpoints; return the checks by URL. Raises UserError if an endpoint takes no requests.

    `on_step` is called with the name of the next check.
    """
    for url in urls:
        try:
            parse_endpoint(url)
        except ValueError as error:
            raise UserError(str(error)) from error
    loaded = load_tokenizer(tokenizer, "--tokenizer") if tokenizer else None
    if loaded is not None and not loaded.chat_template:
        raise UserError(
            f"--tokenizer {tokenizer} has no chat template; give the tokenizer of the chat model that is served"
        )
    key = api_key(key_env, "check-endpoint")
    return {
        parse_endpoint(url).base: asyncio.run(_check(url, loaded, model, key, on_step)) for url in dict.fromkeys(urls)
    }


async def _check(
    url: str, tokenizer: Any, model: str | None, key: str | None, on_step: Callable[[str], None]
) -> list[Check]:
    endpoint = OpenAIModel(url, model or "", key=key, timeout=120.0, role="check-endpoint")
    try:
        on_step(f"{endpoint.url}: which model is served")
        endpoint.name = model or await _only_model(endpoint)
        try:
            await endpoint.check()
        except Unreachable as error:
            raise UserError(f"{endpoint.url} is not ready ({error}); try again when it is") from error
        checks = [Check("model", True, endpoint.name)]
        for name, check in (
            ("chat template", partial(_template, endpoint, tokenizer)),
            ("end of turn", partial(_end_of_turn, endpoint, tokenizer)),
            ("truncation", partial(_truncation, endpoint)),
            ("thinking switch", partial(_thinking_switch, endpoint, tokenizer)),
            ("samples", partial(_samples, endpoint)),
            ("logprobs", partial(_logprobs, endpoint)),
            ("tokens a second", partial(_speed, endpoint)),
        ):
            on_step(f"{endpoint.url}: {name}")
            try:
                ok, message = await check()
            except _NoAnswer as error:
                ok, message = (False if name in _REQUIRED else None), str(error)
            checks.append(Check(name, ok, message[:_MAX_MESSAGE]))
        return checks
    finally:
        await endpoint.close()


async def _only_model(endpoint: OpenAIModel) -> str:
    try:
        names = await endpoint.model_names()
    except (RequestFailed, NotFound, RateLimited, Unreachable, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{endpoint.url} does not list its models ({error}); name one with --model") from error
    if len(names) != 1:
        raise UserError(f"{endpoint.url} serves {', '.join(names) or 'no model'}; name one with --model")
    return names[0]


class _NoAnswer(Exception):
    """A request that the endpoint did not answer with a chat completion."""


async def _ask(endpoint: OpenAIModel, messages: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
    """The body of a chat completion. Raises _NoAnswer."""
    try:
        raw = await endpoint.complete({"messages": list(messages), "temperature": 0.0, **options})
    except (RequestFailed, RateLimited, Unreachable) as error:
        raise _NoAnswer(str(error)) from error
    try:
        body = json.loads(raw)
        body["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _NoAnswer(f"no chat completion: {raw[:80]!r}") from error
    return dict(body)


def _usage(body: Mapping[str, Any], name: str) -> int | None:
    usage = body.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None


async def _template(endpoint: OpenAIModel, tokenizer: Any) -> CheckResult:
    """Compare the server's count of prompt tokens with the tokenizer's: equal counts mean the same template."""
    if tokenizer is None:
        return None, "not compared: give --tokenizer"
    for messages in _CONVERSATIONS:
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        except Exception as error:  # a template raises anything, for example if it takes no system prompt
            if messages is _CONVERSATIONS[-1]:
                return True, f"as the tokenizer's, which takes no system prompt ({error})"[:120]
            raise
        try:
            counted = _usage(await _ask(endpoint, messages, max_tokens=1), "prompt_tokens")
        except _NoAnswer as error:
            return False, f"a conversation of {len(messages)} turns is refused: {error}"
        if counted is None:
            return None, "the server does not say how many tokens a prompt has"
        if counted != len(ids):
            counts = f"{counted} tokens at the server, {len(ids)} by the tokenizer's template"
            return False, f"{counts}, for {messages[-1]['content']!r}"
    return True, f"as many tokens as the tokenizer's, {len(_CONVERSATIONS)} conversations"


async def _end_of_turn(endpoint: OpenAIModel, tokenizer: Any) -> CheckResult:
    """Check that an answer ends by itself and contains no special token."""
    body = await _ask(endpoint, _CONVERSATIONS[0], max_tokens=_TURN_TOKENS)
    text = str(body["choices"][0]["message"].get("content") or "")
    special = sorted(token for token in getattr(tokenizer, "all_special_tokens", ()) if token in text)
    if special:
        return False, f"{special[0]} stands in the answer: it is no stop token at the server"
    finish = body["choices"][0].get("finish_reason")
    if finish is None or incomplete_reason(str(finish)):
        return None, f"the answer to 'Hello' did not end within {_TURN_TOKENS} tokens"
    return True, "the answer ends by itself, without a special token in it"


async def _truncation(endpoint: OpenAIModel) -> CheckResult:
    """Check that the server marks a truncated answer: else half an answer would become chosen or rejected."""
    body = await _ask(endpoint, [{"role": "user", "content": "Count from one to fifty, in words."}], max_tokens=2)
    finish, tokens = body["choices"][0].get("finish_reason"), _usage(body, "completion_tokens")
    if incomplete_reason(finish and str(finish)) == "truncated":
        return True, f"marked by finish_reason {finish}"
    if tokens is not None and tokens < 2:
        return None, f"the answer ended after {tokens} tokens"
    return False, f"max_tokens 2, and finish_reason {finish!r} after {tokens} tokens"


async def _thinking_switch(endpoint: OpenAIModel, tokenizer: Any) -> CheckResult:
    """Compare counts of prompt tokens in both modes of a thinking model: a server may ignore `chat_template_kwargs`."""
    if tokenizer is None or unknown_variable(tokenizer.chat_template, ["enable_thinking"]):
        return None, "not compared: no tokenizer whose template has enable_thinking"
    messages = _CONVERSATIONS[0]
    for mode in (True, False):
        options = {"enable_thinking": mode}
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
        body = await _ask(endpoint, messages, max_tokens=1, chat_template_kwargs=options)
        counted, expected = _usage(body, "prompt_tokens"), len(ids["input_ids"])
        if counted != expected:
            counts = f"{counted} tokens at the server, {expected} by the tokenizer's template"
            return None, f"no effect: chat_template_kwargs {options}: {counts}"
    return True, "chat_template_kwargs {enable_thinking} has its effect"


async def _samples(endpoint: OpenAIModel) -> CheckResult:
    """Check that a second answer differs: two answers of a server with a fixed seed make no judged pair."""
    messages = [{"role": "user", "content": "Tell me a story about something of your choice."}]
    texts = []
    for _ in range(2):
        body = await _ask(endpoint, messages, max_tokens=32, temperature=1.0)
        texts.append(str(body["choices"][0]["message"].get("content")))
    if texts[0] == texts[1]:
        return None, "two answers at temperature 1 are the same: judged pairs need others"
    return True, "two answers at temperature 1 differ"


async def _logprobs(endpoint: OpenAIModel) -> CheckResult:
    body = await _ask(endpoint, _CONVERSATIONS[0], max_tokens=2, logprobs=True, top_logprobs=1)
    logprobs = body["choices"][0].get("logprobs")
    available = isinstance(logprobs, dict) and bool(logprobs.get("content"))
    return (True, "available") if available else (None, "not available")


async def _speed(endpoint: OpenAIModel) -> CheckResult:
    started = time.monotonic()
    prompts = ([{"role": "user", "content": f"Tell me a story about the number {n}."}] for n in range(_SPEED_REQUESTS))
    bodies = await asyncio.gather(*(_ask(endpoint, messages, max_tokens=_SPEED_TOKENS) for messages in prompts))
    counts = [_usage(body, "completion_tokens") for body in bodies]
    if None in counts:
        return None, "the server does not say how many tokens an answer has"
    total = sum(count or 0 for count in counts)
    return True, f"{total / (time.monotonic() - started):.0f} with {_SPEED_REQUESTS} requests at once"
