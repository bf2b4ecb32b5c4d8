"""The embedded world's endpoint: a real OpenAI-compatible HTTP server on 127.0.0.1, in a process of its own.

    python -m recipes.world.server --port 0 --max-seconds 600

prints its URL when it is ready and serves five models: `world-reviser` (answers revision requests, as a rewritten
solution or as edits), `world-target` (answers bare tasks, half of them by a wrong rule), `world-stronger` (answers them
nearly always right, and half of them in many words), `world-judge` (compares two solutions, or scores one) and
`world-second-judge` (scores one, less well). GET /stats returns counts of requests. The server exits after
`--max-seconds`, or when the process that started it is gone. From Python:

    with running(ServerOptions(misbehaviour=Misbehaviour(too_many=0.05))) as server:
        server.url, server.stats()
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from aiohttp import web

from recipes.world.judge import SCORE, Leanings, judge, score
from recipes.world.reviser import (
    Misbehaviour,
    ReplyPlan,
    ServedReply,
    answer,
    plan_reply,
    revise,
    share,
    truncate,
    user_texts,
)
from recipes.world.tides import call, revise_call

MODELS = ("world-reviser", "world-target", "world-stronger", "world-judge", "world-second-judge")


@dataclass(frozen=True)
class ServerOptions:
    """One server: where it listens, how long it lives, how it behaves. Times are in seconds."""

    port: int = 0  # 0 = any free one
    seed: int = 0
    api_key: str | None = None  # absent = no key is asked for
    latency: float = 0.0  # added to every answer
    answers_after: int = 0  # no answer before so many chat requests have been in flight at once
    cap: int | None = None  # more chat requests than this in flight are answered 429
    retry_after: float = 1.0
    slow_seconds: float = 2.0
    max_seconds: float = 3600.0
    leanings: Leanings = field(default_factory=Leanings)
    polish: bool = False  # the reviser also mends the wording
    reviser_error: float = 0.0  # share of revisions that overlook a wrong value
    misbehaviour: Misbehaviour = field(default_factory=Misbehaviour)


@dataclass
class RequestCounts:
    """Counts of requests; `paid` counts the answers with status 200 by the hash of the request body."""

    requests: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    misbehaviours: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "max_in_flight": self.max_in_flight,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "misbehaviours": dict(self.misbehaviours),
            "paid_total": self.paid.total(),
            "paid_distinct": len(self.paid),
            "paid_more_than_once": sum(count > 1 for count in self.paid.values()),
            "paid": dict(self.paid),
        }


class ErrorResponse(Exception):
    """An error response in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}.get(
            status, "invalid_request_error"
        )
        error = {"message": message, "type": kind, "param": None, "code": code}
        self.response = web.json_response({"error": error}, status=status, headers=headers)


def body_hash(body: dict[str, Any]) -> str:
    """The hash of a request body, independent of the order of its keys."""
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


async def read_body(request: web.Request, models: Sequence[str] = MODELS) -> dict[str, Any]:
    """Parse and check the request's JSON object. Raises ErrorResponse."""
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise ErrorResponse(400, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ErrorResponse(400, "messages must be a list of at least one message", "invalid_messages")
    if body.get("model") not in models:
        raise ErrorResponse(404, f"The model `{body.get('model')}` does not exist.", "model_not_found")
    if body.get("stream"):
        raise ErrorResponse(400, "this server does not stream; leave stream out", "unsupported_value")
    return body


class WorldServer:
    """The request handlers and their counts."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.counts = RequestCounts()
        self.crowded = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=16 * 2**20)
        app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.post("/v1/chat/completions", self.chat),
                web.get("/stats", self.stats),
            ]
        )
        return app

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response(self.counts.as_json())

    async def models(self, request: web.Request) -> web.Response:
        try:
            self.check_key(request)
        except ErrorResponse as refused:
            return refused.response
        return web.json_response(model_list(MODELS))

    async def chat(self, request: web.Request) -> web.Response:
        counts = self.counts
        counts.requests += 1
        counts.in_flight += 1
        counts.max_in_flight = max(counts.max_in_flight, counts.in_flight)
        if counts.max_in_flight >= self.options.answers_after:
            self.crowded.set()
        try:
            response = await self.completion(request)
        except ErrorResponse as refused:
            response = refused.response
        finally:
            counts.in_flight -= 1
        counts.statuses[response.status] += 1
        return response

    async def completion(self, request: web.Request) -> web.Response:
        """One chat completion, or ErrorResponse. The order is a real endpoint's: key, limits, body, faults, answer."""
        self.check_key(request)
        options, counts = self.options, self.counts
        if options.cap is not None and counts.in_flight > options.cap:
            counts.misbehaviours["cap"] += 1
            raise self.too_many(f"more than {options.cap} requests in flight")
        body = await read_body(request)
        body_id = body_hash(body)
        planned = plan_reply(options.seed, body_id, options.misbehaviour)
        self.fail_as_planned(body_id, planned)
        await self.crowded.wait()
        if delay := options.latency + options.slow_seconds * planned.slow:
            await asyncio.sleep(delay)
        if planned.slow:
            counts.misbehaviours["slow"] += 1
        result = self.result(body, body_id, planned)
        counts.paid[body_id] += 1
        return web.json_response(result)

    def check_key(self, request: web.Request) -> None:
        key = self.options.api_key
        if key is not None and request.headers.get("Authorization") != f"Bearer {key}":
            raise ErrorResponse(401, "Incorrect API key provided.", "invalid_api_key")

    def too_many(self, why: str) -> ErrorResponse:
        return ErrorResponse(
            429, f"Rate limit reached: {why}.", "rate_limit_exceeded", {"Retry-After": f"{self.options.retry_after:g}"}
        )

    def fail_as_planned(self, body_id: str, planned: ReplyPlan) -> None:
        """Raise Refused for the first attempts at a body that is planned to fail; later attempts succeed."""
        if planned.transport is None:
            return
        self.counts.attempts[body_id] += 1
        if self.counts.attempts[body_id] > planned.failures:
            return
        self.counts.misbehaviours[planned.transport] += 1
        if planned.transport == "too_many":
            raise self.too_many("too many requests per minute")
        raise ErrorResponse(500, "The server had an error while processing your request.", "server_error")

    def result(self, body: dict[str, Any], body_id: str, planned: ReplyPlan) -> dict[str, Any]:
        """The chat.completion object. Tokens are counted as four characters each."""
        try:
            turns = user_texts(body["messages"])
        except (ValueError, AttributeError) as error:
            raise ErrorResponse(400, str(error), "invalid_messages") from None
        count, seed = body.get("n") or 1, self.options.seed
        if body["model"] in ("world-target", "world-stronger"):
            ids = [f"{body_id}-{n}" if n else body_id for n in range(count)]
            replies = [answer(turns[-1], seed, id, stronger=body["model"] == "world-stronger") for id in ids]
            if body.get("tools") and (tool_call := call(turns[-1], seed, body_id)):
                replies = [ServedReply("", "tool_calls", tool_calls=(tool_call,))] * count
        elif SCORE in turns[0] or body["model"] == "world-second-judge":
            second = body["model"] == "world-second-judge"
            replies = [score(turns, planned, seed=seed, body=body_id, second=second)] * count
        elif body["model"] == "world-judge":
            replies = [judge(turns, planned, seed=seed, body=body_id, leanings=self.options.leanings)] * count
        else:
            mended = revise_call(turns, planned)
            mistaken = share(seed, body_id, "reviser error") < self.options.reviser_error
            replies = [mended or revise(turns, planned, polish=self.options.polish, mistaken=mistaken)] * count
        if spoilt := replies[0].spoilt:
            self.counts.misbehaviours[spoilt] += 1
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        return completion_object(body, body_id, [truncate(reply, limit) for reply in replies])


def model_list(models: Sequence[str]) -> dict[str, Any]:
    """OpenAI's list object of models."""
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "world"} for name in models]
    return {"object": "list", "data": data}


def completion_object(body: dict[str, Any], body_id: str, replies: list[ServedReply]) -> dict[str, Any]:
    """OpenAI's chat.completion object around these replies."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text, "refusal": reply.refusal}
            | ({"tool_calls": list(reply.tool_calls)} if reply.tool_calls else {}),
            "logprobs": None,
            "finish_reason": reply.finish_reason,
        }
        for index, reply in enumerate(replies)
    ]
    prompt_tokens = sum(len(str(message.get("content"))) for message in body["messages"]) // 4 + 1
    completion_tokens = sum(len(reply.text) // 4 + 1 for reply in replies)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {
        "id": f"chatcmpl-{body_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": choices,
        "usage": usage,
    }


async def serve(app: web.Application, port: int, max_seconds: float, parent_gone: Callable[[], bool]) -> None:
    """Serve until `max_seconds` are over or the parent is gone. Prints the URL once it listens."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    port = runner.addresses[0][1]
    print(f"http://127.0.0.1:{port}/v1", flush=True)
    deadline = time.monotonic() + max_seconds
    while time.monotonic() < deadline and not parent_gone():  # noqa: ASYNC110 - a parent's end is no event
        await asyncio.sleep(min(0.5, max_seconds))
    await runner.cleanup()


def run_server(app: web.Application, port: int, max_seconds: float) -> None:
    """Serve in this process until `max_seconds` are over, the parent is gone, or Ctrl-C."""
    parent = os.getppid()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(app, port, max_seconds, lambda: os.getppid() != parent))


def parse_options(arguments: list[str] | None = None) -> ServerOptions:
    """Parse the command line. Each rate of `Misbehaviour` is an option of the same name."""
    parser = argparse.ArgumentParser(description="Serve the embedded world's models on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0, help="the port; 0: any free port")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to every answer")
    parser.add_argument("--answers-after", type=int, default=0, help="chat requests in flight before the first answer")
    parser.add_argument("--cap", type=int, help="chat requests in flight; more are answered 429")
    parser.add_argument("--retry-after", type=float, default=1.0, help="seconds, sent with a 429")
    parser.add_argument("--slow-seconds", type=float, default=2.0)
    parser.add_argument("--polish", action="store_true", help="the reviser also improves the wording")
    parser.add_argument("--reviser-error", type=float, default=0.0, help="share of revisions that leave a mistake")
    parser.add_argument(
        "--style", action="store_true", help="of two equally correct answers, the judge prefers the better worded"
    )
    leanings = [leaning.name for leaning in fields(Leanings)]
    for leaning in leanings[:-1]:
        parser.add_argument(f"--{leaning.replace('_', '-')}", type=float, default=0.0, help="share of judgements")
    parser.add_argument("--max-seconds", type=float, default=3600.0, help="seconds after which the server stops")
    rates = [rate.name for rate in fields(Misbehaviour)]
    for rate in rates:
        parser.add_argument(f"--{rate.replace('_', '-')}", type=float, default=0.0, help="share of distinct requests")
    values = vars(parser.parse_args(arguments))
    groups = {"misbehaviour": (Misbehaviour, rates), "leanings": (Leanings, leanings)}
    grouped = {name: kind(**{key: values.pop(key) for key in keys}) for name, (kind, keys) in groups.items()}
    return ServerOptions(**values, **grouped)


def main() -> None:
    options = parse_options()
    run_server(WorldServer(options).app(), options.port, options.max_seconds)


if __name__ == "__main__":
    main()
