"""A service with a Batch API that has bad days: it loses, shuffles, duplicates, fails and expires batches on demand.

    python -m tests.clair.batch_server

prints its URL and answers live requests as scripted_server.py does, whose scripts it also follows in batches: there a
step is one of its replies (`ok`, `400`, `html` ...), or `unlabelled`: well-formed only when it is asked again. POST
/trouble sets what goes wrong from now on (see Trouble) and forgets all files and batches; GET /books tells what was
uploaded, run and delivered.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field, fields
from typing import Any

from aiohttp import web

from recipes.world.server import run_server
from tests.clair.scripted_server import REPLIES, SECONDS_TO_LIVE, Scripted, raw, refused, reply, revision_reply

LINE_MAY = ("lose", "double", "error", "expire", "garble")


@dataclass
class Trouble:
    """Odds by line: of a result that is lost after it was paid for, doubled, a server error, not run in time, or a
    line that is no JSON. By call: of an answer that is an error (`unwell`), or does not come though the call was done
    (`silent`), or breaks off in the middle of a file (`half`). By batch: `expired`, `cancelled` or `failed`.
    """

    seed: int = 0
    lose: float = 0.0
    double: float = 0.0
    error: float = 0.0
    expire: float = 0.0
    garble: float = 0.0
    unwell: float = 0.0
    silent: float = 0.0
    half: float = 0.0
    foreign: int = 0
    expired: float = 0.0
    cancelled: float = 0.0
    failed: float = 0.0
    looks: int = 2
    """The maximum of status requests until a batch has ended."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    """The error of a failed batch; by default too many tokens."""
    max_lines: int = 50_000
    """Files with more lines are refused when the batch begins."""
    counts: bool = True
    lists: bool = True
    refuse_files: int = 0
    """The status that every upload is refused with."""
    hold: bool = False
    """No batch ends."""


class BatchClient(Scripted):
    """Files and batches in memory, and the books."""

    def __init__(self) -> None:
        super().__init__()
        self.reset(Trouble())

    def reset(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.random = random.Random(trouble.seed)
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.events: list[tuple[str, str]] = []
        self.unwell: dict[str, int] = {}

    def app(self) -> web.Application:
        app = super().app()
        app._client_max_size = 512 * 2**20
        app.add_routes(
            [
                web.post("/v1/files", self.call(self.upload)),
                web.get("/v1/files/{id}/content", self.call(self.content)),
                web.post("/v1/batches", self.call(self.create)),
                web.get("/v1/batches", self.call(self.list)),
                web.get("/v1/batches/{id}", self.call(self.retrieve)),
                web.post("/trouble", self.set_trouble),
                web.post("/end/{status}", self.end_all),
                web.post("/lose", self.lose_all),
                web.get("/books", self.books),
            ]
        )
        return app

    # ---- for the tests

    async def set_trouble(self, request: web.Request) -> web.Response:
        values = await request.json()
        assert set(values) <= {f.name for f in fields(Trouble)}, values
        self.reset(Trouble(**values))
        return web.Response()

    async def end_all(self, request: web.Request) -> web.Response:
        """All batches end now, in this status."""
        self.trouble.hold = False
        for batch in self.batches.values():
            batch["ends"] = request.match_info["status"]
            batch["looks"] = 0
        return web.Response()

    async def lose_all(self, request: web.Request) -> web.Response:
        """The service forgets its batches (`{"files": true}`: only the result files)."""
        if (await request.json()).get("files"):
            self.files = {id: content for id, content in self.files.items() if id.startswith("in")}
        else:
            self.batches.clear()
        return web.Response()

    async def books(self, _: web.Request) -> web.Response:
        sizes = [len(content.splitlines()) for id, content in self.files.items() if id.startswith("in")]
        statuses = [batch["status"] for batch in self.batches.values()]
        return web.json_response(
            {
                "events": self.events,
                "live": [request["step"] for request in self.requests],
                "files": sizes,
                "batches": statuses,
                "bytes": [len(content) for id, content in self.files.items() if id.startswith("in")],
            }
        )

    # ---- the API

    def call(self, handler: Any) -> Any:
        """A handler on a bad day: at most three bad answers in a row to the same call, so that patience is enough."""

        async def handle(request: web.Request) -> web.StreamResponse:
            trouble, name = self.trouble, handler.__name__
            bad = self.unwell.get(name, 0) < 3
            if bad and self.random.random() < trouble.unwell:
                self.unwell[name] = self.unwell.get(name, 0) + 1
                return self.random.choice([REPLIES["503"], REPLIES["502"], REPLIES["429ms"]])("")
            response = await handler(request)
            if bad and self.random.random() < trouble.silent:
                self.unwell[name] = self.unwell.get(name, 0) + 1
                assert request.transport is not None
                request.transport.close()
                return web.Response()
            self.unwell[name] = 0
            return response

        return handle

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        assert form["purpose"] == "batch"
        if self.trouble.refuse_files:
            return refused(self.trouble.refuse_files, "The file is not to our liking.")
        id = f"in-{len(self.files)}"
        self.files[id] = form["file"].file.read()
        return web.json_response({"id": id, "object": "file", "bytes": len(self.files[id]), "purpose": "batch"})

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["endpoint"] == "/v1/chat/completions"
        assert body["completion_window"] == "24h"
        id, odds = f"batch-{len(self.batches)}", self.random.random()
        final_status = "completed"
        for status in ("expired", "cancelled", "failed"):
            odds -= getattr(self.trouble, status)
            if odds < 0:
                final_status = status
                break
        lines = self.files[body["input_file_id"]].split(b"\n")[:-1]
        if len(lines) > self.trouble.max_lines:
            final_status = "failed"
        self.batches[id] = {
            "id": id,
            "object": "batch",
            "status": "validating",
            "input_file_id": body["input_file_id"],
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "ends": final_status,
            "looks": self.random.randint(0, self.trouble.looks),
        }
        return self.response_of(self.batches[id])

    async def list(self, request: web.Request) -> web.Response:
        if not self.trouble.lists:
            return refused(404, "No such route.")
        newest = [self.public(batch) for batch in reversed(self.batches.values())]
        cursor = request.query.get("after")
        start = next((n + 1 for n, batch in enumerate(newest) if batch["id"] == cursor), 0)
        page = newest[start : start + 2]  # short pages, so that there are several
        return web.json_response({"object": "list", "data": page, "has_more": start + 2 < len(newest)})

    async def retrieve(self, request: web.Request) -> web.Response:
        batch = self.batches.get(request.match_info["id"])
        if batch is None:
            return refused(404, f"No batch found with id '{request.match_info['id']}'.")
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            batch["looks"] -= 1
            if batch["looks"] < 0 and not self.trouble.hold:
                self.run(batch)
        return self.response_of(batch)

    def public(self, batch: dict[str, Any]) -> dict[str, Any]:
        hidden = {"ends", "looks"} | (set() if self.trouble.counts else {"request_counts"})
        return {key: value for key, value in batch.items() if key not in hidden}

    def response_of(self, batch: dict[str, Any]) -> web.Response:
        return web.json_response(self.public(batch))

    def run(self, batch: dict[str, Any]) -> None:
        """Run a batch as far as its end lets it, and lay its files out in some order."""
        batch["status"] = batch["ends"]
        if batch["ends"] == "failed":
            too_much = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached.", "line": None}]
            batch["errors"] = {"object": "list", "data": self.trouble.errors or too_much}
            return
        output: list[bytes] = []
        errors: list[bytes] = []
        lines = self.files[batch["input_file_id"]].split(b"\n")[:-1]
        for number, line in enumerate(lines):
            request = json.loads(line)
            late = batch["ends"] != "completed" and number >= len(lines) * 0.6
            self.run_line(request, late or self.random.random() < self.trouble.expire, batch, output, errors)
        for n in range(self.trouble.foreign):
            output.append(self.line(f"nobody-{n}", 200, REPLIES["ok"]("somebody else's").body))
        for kind, lines in (("output", output), ("error", errors)):
            self.random.shuffle(lines)
            id = f"out-{kind}-{batch['id']}"
            self.files[id] = b"".join(lines)
            batch[f"{kind}_file_id"] = id if lines else None

    def run_line(self, request: Any, late: bool, batch: Any, output: list[bytes], errors: list[bytes]) -> None:
        trouble, id, counts = self.trouble, request["custom_id"], batch["request_counts"]
        assert request["url"] == "/v1/chat/completions"
        assert request["method"] == "POST"
        if late:
            code = "batch_expired" if batch["ends"] != "cancelled" else "batch_cancelled"
            if self.random.random() < 0.5:  # some services list what they did not run, some do not
                errors.append(self.line(id, None, None, {"code": code, "message": "Not run in time."}))
            return
        if self.random.random() < trouble.error:
            counts["failed"] += 1
            errors.append(self.line(id, 500, b'{"error": {"message": "Internal error."}}'))
            return
        messages = request["body"]["messages"]
        text = messages[0]["content"]
        script = re.search(r"\[\[([^\]]*)\]\]", text)
        steps = script[1].split() if script else ["ok"]
        step = steps[min(self.tries[id], len(steps) - 1)]
        self.tries[id] += 1
        if step == "unlabelled":  # and well-formed when it is asked again
            answer = revision_reply(text) if len(messages) > 1 else reply({"content": "It is good as it is."})
        else:
            answer = REPLIES[step](text)
        if answer.status >= 300:
            counts["failed"] += 1
            errors.append(self.line(id, answer.status, answer.body))
            return
        counts["completed"] += 1
        self.events.append(("ran", id))
        line = self.line(id, 200, answer.body)
        if self.random.random() < trouble.lose:
            return
        if self.random.random() < trouble.garble:
            output.append(line[: len(line) // 2] + b"\n")
            return
        output += [line] * (2 if self.random.random() < trouble.double else 1)

    def line(self, id: str, status: int | None, body: bytes | None, error: Any = None) -> bytes:
        try:
            content = json.loads(body or b"null")
        except ValueError:
            content = (body or b"").decode()
        response = {"status_code": status, "request_id": "r", "body": content} if status else None
        return json.dumps({"id": "l", "custom_id": id, "response": response, "error": error}).encode() + b"\n"

    async def content(self, request: web.Request) -> web.StreamResponse:
        id = request.match_info["id"]
        content = self.files.get(id)
        if content is None:
            return refused(404, "No such file.")
        if self.unwell.get(id, 0) < 2 and self.random.random() < self.trouble.half:
            self.unwell[id] = self.unwell.get(id, 0) + 1
            if self.random.random() < 0.5:  # half of it, and the headers do not show it
                return raw(content[: len(content) // 2], "application/octet-stream")
            response = web.StreamResponse(headers={"Content-Length": str(len(content))})
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        for line in content.split(b"\n"):
            if b'"status_code": 200' in line and line.endswith(b"}"):
                row = json.loads(line)
                kind = "delivered" if row["response"]["body"].get("choices") else "delivered without a reply"
                self.events.append((kind, row["custom_id"]))
        return raw(content, "application/octet-stream")


if __name__ == "__main__":
    run_server(BatchClient().app(), 0, SECONDS_TO_LIVE)
