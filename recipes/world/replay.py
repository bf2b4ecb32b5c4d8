"""Replay twelve recorded revisions of GPT-4: `clair build` on a loopback endpoint that returns the recorded replies.

    python -m recipes.world.replay                     # from the repository's root; ends in runs/replay
    python -m recipes.world.replay --shared ../shared  # where the recordings are, else $CLAIR_SHARED or ../shared

The recorded rejected answers take the place of the target's. The reply to a request is looked up by its task and the
student's solution, so the request itself is built by this version's own templates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.core.recipe import resolve
from clair.pipeline.build import BuildResult, build
from clair.pipeline.config import BuildConfig
from recipes.world.reviser import read_request

Row = Mapping[str, Any]


def read_recordings(shared: str | Path | None = None) -> list[Row]:
    """The recorded requests and replies. Raises UserError if the folder does not exist."""
    folder = Path(shared or os.environ.get("CLAIR_SHARED") or "../shared")
    file = folder / "data" / "clair_gpt4" / "replies.jsonl"
    if not file.is_file():
        raise UserError(f"no recordings at {file}; name the folder with --shared or CLAIR_SHARED")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def completion(rows: Sequence[Row], body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recorded chat completion for a request, or None if it was not recorded."""
    parsed = read_request(body["messages"][-1]["content"])
    row = next((r for r in rows if parsed and (r["prompt"], r["rejected"]) == (parsed.task, parsed.student)), None)
    if row is None:
        return None
    message = {"role": "assistant", "content": row["reply"]}
    return {
        "id": row["id"],
        "object": "chat.completion",
        "created": 0,
        "model": row["reviser"],
        "choices": [{"index": 0, "message": message, "finish_reason": row["finish_reason"]}],
        "usage": row["usage"],
    }


@contextmanager
def replay_server(rows: Sequence[Row]) -> Iterator[str]:
    """Serve the recorded replies on 127.0.0.1 for the length of a `with` block. Yields the URL."""
    ready, urls, loop = threading.Event(), list[str](), asyncio.new_event_loop()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name, "object": "model"} for name in {r["reviser"] for r in rows}]})

    async def chat(request: web.Request) -> web.Response:
        reply = completion(rows, await request.json())
        if reply is None:
            return web.json_response({"error": {"message": "this request was never recorded"}}, status=400)
        return web.json_response(reply)

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=16 * 2**20)
        app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, name="replay", daemon=True)
    thread.start()
    ready.wait(30)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def replay(rows: Sequence[Row], out: str | Path, **changes: Any) -> BuildResult:
    """Build the dataset of the recorded revisions in `out`, its prompts beside it. `changes` override the recipe."""
    prompts = Path(f"{out}.prompts.jsonl")
    lines = ({"id": r["id"], "prompt": r["prompt"], "answer": r["rejected"]} for r in rows)
    write_atomically(prompts, "".join(json.dumps(line) + "\n" for line in lines))
    with replay_server(rows) as url:
        reviser = {
            "url": url,
            "id": f"{rows[0]['reviser']}, recorded",
            "model": rows[0]["reviser"],
            "temperature": rows[0]["temperature"],
            "max_tokens": rows[0]["max_tokens"],
        }
        recipe = {"pipeline": "revised", "prompts": {"path": str(prompts)}, "reviser": reviser, "out": str(out)}
        return build(resolve(BuildConfig, recipe | changes))


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay the recorded GPT-4 revisions into a dataset.")
    parser.add_argument("--shared", help="the folder that holds data/clair_gpt4, instead of $CLAIR_SHARED or ../shared")
    parser.add_argument("--out", default="runs/replay", help="the dataset folder")
    args = parser.parse_args()
    from clair.core.console import show
    from clair.terminal import summary

    try:
        rows = read_recordings(args.shared)
        result = replay(rows, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    show(summary([result.out]))
    show(f"{len(rows)} recorded revisions are now {result.out}; look at the pairs with: clair show {result.out}")


if __name__ == "__main__":
    main()
