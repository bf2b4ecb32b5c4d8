"""An endpoint that follows the script in the prompt: `[[500 429:0.2 ok]]` in the user message is one step a try.

    python -m tests.clair.scripted_server

prints its URL, serves the model `m`, and ends with its parent or after four hours. Without a script the reply is a
well-formed revision of the student's solution, with `bad` turned into `good`, so that a misaligned row shows; to what
is no revision request, a bad answer.
GET /seen lists every request: when it came, the step it was answered with, its headers and body; GET /forget forgets
them and begins every script anew; GET /looked-at lists the headers of every look at the models.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

from aiohttp import web

from recipes.world.server import run_server

SECONDS_TO_LIVE = 4 * 3600
Answer = Callable[[web.Request, str], Awaitable[web.StreamResponse]]


def revision(text: str) -> str:
    """The well-formed revision of a revision request; to anything else, a bad answer."""
    student = re.search(r"<student_solution>\n(.*)\n</student_solution>", text, re.DOTALL)
    if not student:
        return f"bad answer to: {text}"
    return "{teacher_reasoning}:\nwhy\n\n{corrected_student_solution}:\n" + student[1].replace("bad", "good")


def completion(message: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A chat completion around one message; a change to None leaves the key out."""
    body = {
        "id": "c",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20},
    } | changes
    return {key: value for key, value in body.items() if value is not None}


def reply(message: dict[str, Any], **changes: Any) -> web.Response:
    return web.json_response(completion(message, **changes))


def revision_reply(text: str, **changes: Any) -> web.Response:
    return reply({"content": revision(text)}, **changes)


def raw(body: bytes, content_type: str = "application/json", status: int = 200, **headers: str) -> web.Response:
    return web.Response(body=body, status=status, headers={"Content-Type": content_type} | headers)


def refused(status: int, message: str, code: str | None = None, **headers: str) -> web.Response:
    error = {"message": message, "type": "error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


def usage(**numbers: str) -> Callable[[str], web.Response]:
    """A reply with these numbers as its usage, as they stand."""

    def with_usage(text: str) -> web.Response:
        body = json.dumps(completion({"content": revision(text)}, usage={"prompt_tokens": "@"}))
        inside = ", ".join(f'"{name}": {number}' for name, number in numbers.items())
        return raw(body.replace('{"prompt_tokens": "@"}', "{" + inside + "}").encode())

    return with_usage


def thinking(text: str) -> str:
    return f"<think>\nmaybe {revision('bad idea')}\n</think>\n\n{revision(text)}"


def stream(text: str) -> web.Response:
    """A stream of tool calls, though none was requested."""
    call = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": revision(text)}}
    chunks = [{"object": "chat.completion.chunk", "choices": [{"delta": {"tool_calls": [call]}}]}] * 3
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    return raw("".join(lines).encode(), "text/event-stream")


HTML = b"<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"

STEER = "no \x1b]52;c;cHduZWQ=\x07\x1b[2J\x9b31m\u202e way"
FILTERED = {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}, "message": "Filtered."}
FLAGGED = {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["violence"]}}


def failed(error: dict[str, Any], status: int = 200) -> Callable[[str], web.Response]:
    return lambda text: web.json_response({"error": error}, status=status)


REPLIES: dict[str, Callable[[str], web.Response]] = {
    "ok": revision_reply,
    "nousage": lambda text: revision_reply(text, usage=None),
    "infinite": usage(prompt_tokens="1e999", completion_tokens="Infinity"),
    "nan": usage(prompt_tokens="NaN", completion_tokens='"many"'),
    "huge": usage(prompt_tokens="1" + "0" * 40, completion_tokens="1e300"),
    "negative": usage(prompt_tokens="-5", completion_tokens="null"),
    "othername": lambda text: revision_reply(text, model="another-model"),
    "noname": lambda text: revision_reply(text, model=None, id=None, object=None),
    "reasoning": lambda text: reply({"content": revision(text), "reasoning_content": revision("bad idea")}),
    "think": lambda text: reply({"content": thinking(text)}),
    "closethink": lambda text: reply({"content": thinking(text).removeprefix("<think>")}),
    "openthink": lambda text: reply({"content": "<think>\n" + revision(text)}),
    "parts": lambda text: reply({"content": [{"type": "text", "text": revision(text)}]}),
    "null": lambda text: reply({"content": None}),
    "number": lambda text: reply({"content": 7}),
    "nocontent": lambda text: reply({}),
    "length": lambda text: reply({}, choices=[{"message": {"content": revision(text)}, "finish_reason": "length"}]),
    "nofinish": lambda text: reply({}, choices=[{"message": {"content": revision(text)}}]),
    "tool": lambda text: reply({"content": None, "tool_calls": [{"id": "t", "function": {"name": "f"}}]}),
    "stream": stream,
    "empty": lambda text: revision_reply(text, choices=[]),
    "nochoices": lambda text: revision_reply(text, choices=None),
    "nullchoice": lambda text: revision_reply(text, choices=[None]),
    "textchoice": lambda text: revision_reply(text, choices="text"),
    "list": lambda text: raw(b"[]"),
    "nulljson": lambda text: raw(b"null"),
    "badjson": lambda text: raw(json.dumps(completion({"content": revision(text)})).encode()[:-5]),
    "deep": lambda text: raw(b"[" * 100_000),
    "html": lambda text: raw(HTML, "text/html"),
    "nothing": lambda text: raw(b""),
    "204": lambda text: web.Response(status=204),
    "utf8": lambda text: raw(json.dumps(completion({"content": revision(text) + "@"})).encode().replace(b"@", b"\xff")),
    "nul": lambda text: reply({"content": revision(text).replace("good", "go\x00od")}),
    "surrogate": lambda text: reply({"content": revision(text).replace("good", "good\ud83d")}),
    "big": lambda text: reply({"content": revision(text) + " " + "x" * 5_000_000}),
    "bightml": lambda text: raw(HTML * 80_000, "text/html"),
    "gzip": lambda text: raw(b"this is no gzip", **{"Content-Encoding": "gzip"}),
    "400": lambda text: refused(400, "This prompt is too long."),
    "400surrogate": lambda text: refused(400, "Cannot read '\ud83d"),
    "400big": lambda text: refused(400, "no " * 1_000_000),
    "400steer": lambda text: refused(400, STEER),
    "401steer": lambda text: refused(401, STEER),
    "429steer": lambda text: refused(429, STEER),
    "steer": lambda text: reply({"content": revision(text) + STEER}),
    "400text": lambda text: raw(b"no\nway", "text/plain", 400),
    "400filter": failed(FILTERED, 400),
    "402": lambda text: refused(402, "Insufficient credits."),
    "403flagged": failed(FLAGGED, 403),
    "403html": lambda text: raw(HTML, "text/html", 403),
    "body402": failed({"code": 402, "message": "Insufficient credits."}),
    "body429": failed({"code": 429, "message": "Rate limit exceeded."}),
    "body503": failed({"code": "503", "message": "Overloaded."}),
    "bodyerror": failed({"code": "odd", "message": "Something."}),
    "401": lambda text: refused(401, "Incorrect API key provided."),
    "403": lambda text: refused(403, "You may not use this model."),
    "404": lambda text: refused(404, "The model `m` does not exist.", "model_not_found"),
    "404html": lambda text: raw(HTML, "text/html", 404),
    "408": lambda text: refused(408, "Too slow."),
    "409": lambda text: refused(409, "Conflict."),
    "413": lambda text: refused(413, "Too large."),
    "422": lambda text: refused(422, "Unprocessable."),
    "quota": lambda text: refused(429, "You exceeded your current quota.", "insufficient_quota"),
    "429ms": lambda text: refused(429, "Slow down.", **{"retry-after-ms": "300"}),
    "429date": lambda text: refused(429, "Slow down.", **{"Retry-After": formatdate(time.time() + 2, usegmt=True)}),
    "429words": lambda text: refused(429, "Slow down.", **{"Retry-After": "soon"}),
    "429html": lambda text: raw(HTML, "text/html", 429),
    "500": lambda text: refused(500, "Internal error."),
    "502": lambda text: raw(HTML, "text/html", 502),
    "503": lambda text: refused(503, "Overloaded."),
    "529": lambda text: refused(529, "Overloaded."),
}


class Scripted:
    """Follows the script in each prompt, one step for each time that the same body comes."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.model_requests: list[dict[str, str]] = []
        self.looks = 0
        self.slot = asyncio.Lock()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.post("/v1/chat/completions", self.chat),
                web.get("/broken/v1/models", self.broken_models),
                web.post("/broken/v1/chat/completions", self.chat),
                web.get("/loading/v1/models", self.loading),
                web.post("/loading/v1/chat/completions", self.loading),
                web.get("/one/v1/models", self.models),
                web.post("/one/v1/chat/completions", self.serial_chat),
                web.get("/seen", self.send_requests),
                web.get("/forget", self.forget),
                web.get("/looked-at", self.send_model_requests),
            ]
        )
        return app

    async def models(self, request: web.Request) -> web.Response:
        self.model_requests.append(dict(request.headers))
        return web.json_response({"data": [{"id": "m"}, {"id": "t"}]})

    async def broken_models(self, request: web.Request) -> web.Response:
        return raw(HTML, "text/html", 500, Connection="close")

    async def serial_chat(self, request: web.Request) -> web.StreamResponse:
        """Answer in the order in which the requests came, whether anybody still waits or not."""
        body = await request.read()  # stored by aiohttp, for chat
        assert body
        async with self.slot:
            return await self.chat(request)

    async def loading(self, request: web.Request) -> web.StreamResponse:
        """Not ready for the first five requests."""
        self.looks += 1
        if self.looks <= 5:
            return refused(503, "Loading model")
        return await (self.chat if request.method == "POST" else self.models)(request)

    async def send_requests(self, _: web.Request) -> web.Response:
        return web.json_response(self.requests)

    async def send_model_requests(self, _: web.Request) -> web.Response:
        return web.json_response(self.model_requests)

    async def forget(self, _: web.Request) -> web.Response:
        self.tries.clear()
        self.requests.clear()
        self.model_requests.clear()
        self.looks = 0
        return web.Response()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        text = json.loads(body)["messages"][-1]["content"]
        script = re.search(r"\[\[([^\]]*)\]\]", text)
        steps = script[1].split() if script else ["ok"]
        key = json.dumps([json.loads(body)["model"] == "m", text])
        step = steps[min(self.tries[key], len(steps) - 1)]
        self.tries[key] += 1
        self.requests.append(
            {
                "at": time.time(),
                "step": step,
                "headers": dict(request.headers),
                "query": request.query_string,
                "body": json.loads(body),
            }
        )
        return await self.follow(step, request, text)

    async def follow(self, step: str, request: web.Request, text: str) -> web.StreamResponse:
        name, _, number = step.partition(":")
        if name == "wait":  # wait:0.5 and then a good reply
            await asyncio.sleep(float(number))
            return revision_reply(text)
        if name == "429":
            return refused(429, "Slow down.", **({"Retry-After": number} if number else {}))
        if name.startswith("echo"):  # a careless server repeats what it was sent
            details = f"{dict(request.headers)}, url {request.url}"
            if name == "echo200":
                return raw(details.encode(), "text/plain")
            return refused(int(name[4:]), f"Wrong credentials: {details}")
        if name == "drop":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if name == "half":
            body = json.dumps(completion({"content": revision(text)})).encode()
            response = web.StreamResponse(headers={"Content-Length": str(len(body))})
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        if name == "garbled":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}")
            request.transport.close()
            return web.Response()
        if name == "trickle":  # an empty line now and then, for as long as somebody listens
            response = web.StreamResponse()
            await response.prepare(request)
            while request.transport is not None and not request.transport.is_closing():
                await response.write(b"\n")
                await asyncio.sleep(0.2)
            return response
        if name == "redirect":
            return web.Response(status=307, headers={"Location": "/elsewhere"})
        return REPLIES[name](text)


if __name__ == "__main__":
    run_server(Scripted().app(), 0, SECONDS_TO_LIVE)
