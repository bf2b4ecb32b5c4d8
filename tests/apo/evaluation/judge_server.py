"""A judge and a model behind one OpenAI-compatible URL, in a process of their own.

    python -m tests.apo.evaluation.judge_server [--latency 0.05]

prints its URL and ends with its parent or after four hours. What it says stands in the text it is asked about:
`<<[[0.7]]>>` is the reply, `<<a|b>>` one reply for each time that the same body comes, the last one ever after.
`LENGTH:text` ends at a limit of tokens, `FILTER:text` in a content filter, `HTTP400` is that status, `BODY429` an error
of that code in the body of a 200. Without such a script a judge (model `j` or `j2`) gives a verdict that follows from a
hash of the request, a model (any other name) an answer that does.
GET /seen lists the bodies of all requests; GET /paid their number; GET /forget forgets them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
from collections import Counter
from typing import Any

from aiohttp import web

from recipes.world.server import run_server

SECONDS_TO_LIVE = 4 * 3600


class Server:
    """Follow the scripts in the requests, and count the answers."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.requests: list[dict[str, Any]] = []
        self.tries: Counter[str] = Counter()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.post("/v1/chat/completions", self.chat),
                web.get("/seen", self.send_requests),
                web.get("/paid", self.count),
                web.get("/forget", self.forget),
            ]
        )
        return app

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "j"}, {"id": "j2"}, {"id": "t"}]})

    async def send_requests(self, _: web.Request) -> web.Response:
        return web.json_response(self.requests)

    async def count(self, _: web.Request) -> web.Response:
        return web.json_response(len(self.requests))

    async def forget(self, _: web.Request) -> web.Response:
        self.requests.clear()
        self.tries.clear()
        return web.Response()

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        text = body["messages"][-1]["content"]
        await asyncio.sleep(self.latency)
        scripted = self.answer_to(body, text)
        ending, _, cut = scripted.partition(":")
        finish = {"LENGTH": "length", "FILTER": "content_filter"}.get(ending, "stop")
        if scripted.startswith("HTTP"):
            return web.json_response({"error": {"message": "System role not supported"}}, status=int(scripted[4:]))
        if scripted.startswith("BODY"):
            return web.json_response({"error": {"message": "Rate limit exceeded", "code": int(scripted[4:])}})
        message = {"role": "assistant", "content": scripted if finish == "stop" else cut}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": len(text) // 4, "completion_tokens": len(scripted) // 4 + 1}
        model = f"{body['model']}-0125"
        return web.json_response({"object": "chat.completion", "model": model, "choices": [choice], "usage": usage})

    def answer_to(self, body: dict[str, Any], text: str) -> str:
        script = re.search(r"<<(.*?)>>", text, re.DOTALL)
        key = json.dumps(body, sort_keys=True)
        self.tries[key] += 1
        if script:
            steps = script[1].split("|")
            return steps[min(self.tries[key], len(steps)) - 1]
        number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
        if body["model"] not in ("j", "j2"):
            return f"It is {number % 7}."
        if "xtract" in body["messages"][0]["content"]:
            return f"The option chosen by the model: [[{'AB'[number % 2]}]]."
        return f"The correctness score: [[{number % 11 / 10}]]."


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    run_server(Server(parser.parse_args().latency).app(), 0, SECONDS_TO_LIVE)
