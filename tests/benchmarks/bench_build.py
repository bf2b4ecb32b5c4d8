"""What `clair build` costs by itself: the command against a server that answers at once, on the same cores.

    ROWS=100000 python tests/benchmarks/run.py build

A row is one request over HTTP, one reply on disk, one parse, the filters, the contrast and a row of Parquet; its prompt
carries a ready answer. Processor time is that of the command, its start included, and of the server by itself. A tenth
of the rows is built under a sampling profiler, which looks every 2 ms of processor time where the main thread is, to
say which part has which share; and again, with all replies in the ledger.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS, CONCURRENCY = int(os.environ.get("ROWS", "10000")), 64
_SAMPLE_SECONDS = 0.002
_CAUSES = {  # the innermost frame in one of these files decides; core and libraries count for their caller
    "HTTP": ("/aiohttp/", "/clair/inference/http/"),
    "request: body, time limit, errors, reply": ("/clair/inference/openai.py", "/clair/inference/model.py"),
    "limits, budget, retries": ("/clair/inference/",),
    "ledger": ("/clair/ledger/",),
    "prompts: template, parsing": ("/clair/prompting/",),
    "prompt file, contrast, dataset files": ("/clair/data/",),
    "pipeline, filters": ("/clair/pipeline/",),
    "progress": ("/clair/terminal.py", "/clair/core/progress.py"),
    "event loop": ("/asyncio/",),
}


def measure() -> dict[str, Any]:
    """The command's seconds, processor milliseconds a row and share by cause; a second run from the ledger."""
    sys.path.insert(0, str(ROOT))
    from recipes.world.running import running_module

    with tempfile.TemporaryDirectory() as folder, running_module("tests.benchmarks.bench_build", ["serve"]) as server:
        whole, part = (_write(Path(folder) / str(rows), rows, server.url) for rows in (ROWS, ROWS // 10))
        before = _processor_seconds(server.pid)
        built = _command(whole, ROWS)
        built["server_cpu_ms_per_row"] = round(1000 * (_processor_seconds(server.pid) - before) / ROWS, 3)
        shares = _command(part, ROWS // 10, "profile")["shares"]
        again = _command(part, ROWS // 10)
    return {
        "rows": ROWS,
        "concurrency": CONCURRENCY,
        "load_average": round(os.getloadavg()[0], 1),
        "over_http": built,
        "from_ledger": again,
        "shares": shares,
        "python": sys.version.split()[0],
    }


def _write(folder: Path, rows: int, url: str) -> Path:
    """The prompts and the recipe in a new folder."""
    folder.mkdir()
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": f"question {i} " * 8, "answer": f"a bad answer to {i} " * 10}) + "\n")
    recipe = {
        "pipeline": "revised",
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "reviser": {"url": url, "model": "m", "temperature": 0.7},
        "concurrency": CONCURRENCY,
        "out": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
    return folder / "recipe.yaml"


def _command(recipe: Path, rows: int, *options: str) -> dict[str, Any]:
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_build", "build", str(recipe), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - started
    manifest = json.loads((recipe.parent / "out/manifest.json").read_text("utf-8"))
    assert manifest["counts"]["pairs"] == rows, manifest["drop_reasons"]
    measured = json.loads(process.stdout.splitlines()[-1])
    cpu = measured.pop("cpu_seconds")
    return {
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "cpu_ms_per_row": round(1000 * cpu / rows, 3),
        "rows_per_cpu_second": round(rows / cpu),
        **measured,
    }


def _processor_seconds(pid: int) -> float:
    """The processor time of a running process's main thread, by Linux's scheduler."""
    return int(Path(f"/proc/{pid}/schedstat").read_text("utf-8").split()[0]) / 1e9


def _build(recipe: str, profile: str | None = None) -> None:
    """The command `clair build` in this process, and what it used."""
    samples: Counter[str] = Counter()
    if profile:
        signal.signal(signal.SIGPROF, lambda _, frame: samples.update([_cause(frame)]))
        signal.setitimer(signal.ITIMER_PROF, _SAMPLE_SECONDS, _SAMPLE_SECONDS)
    from clair.cli import app

    app(["build", recipe], standalone_mode=False)
    signal.setitimer(signal.ITIMER_PROF, 0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    measured: dict[str, Any] = {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_mb": round(used.ru_maxrss / 1024)}
    if profile:
        measured["shares"] = {cause: round(n / samples.total(), 3) for cause, n in samples.most_common()}
    print(json.dumps(measured))


def _cause(frame: Any) -> str:
    """The part of the program that a frame works for."""
    innermost = "start and end"
    while frame is not None:
        file = frame.f_code.co_filename
        cause = next((cause for cause, names in _CAUSES.items() if any(name in file for name in names)), None)
        if cause not in (None, "event loop"):
            return cause
        innermost = cause or innermost
        frame = frame.f_back
    return innermost


def _serve() -> None:
    from aiohttp import web

    from recipes.world.server import run_server
    from tests.clair.scripted_server import revision_reply

    async def chat(request: web.Request) -> web.Response:
        return revision_reply((await request.json())["messages"][-1]["content"])

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    run_server(app, 0, 3600)


if __name__ == "__main__":
    _serve() if sys.argv[1] == "serve" else _build(*sys.argv[2:])
