"""The same job done by clair, distilabel, curator and Data Designer: how long, how many rows right, what is paid twice.

    python tests/benchmarks/run.py peers            ROWS=50 for a short try; ONLY=clair,curator for some

Every row is one chat call to the same server on 127.0.0.1, a process of its own, which answers after a while; each tool
reads rows, asks with the concurrency that its own option allows, everything else at its defaults, and gives its result
rows. Seconds are from the tool's call to its rows, imports done before; `at the server` is from the first request to
the last answer. A tool is skipped, with the reason, where its Python is not named:

    python3.11 -m venv /tmp/peers
    /tmp/peers/bin/pip install 'distilabel[openai]==1.5.3' bespokelabs-curator==0.1.31
    export DISTILABEL_PYTHON=/tmp/peers/bin/python CURATOR_PYTHON=/tmp/peers/bin/python
    python3.11 -m venv /tmp/designer && /tmp/designer/bin/pip install data-designer==0.9.6
    export DATA_DESIGNER_PYTHON=/tmp/designer/bin/python

    constant      500 rows, 1 s each, concurrency 50                          ideal 10 s
    exponential   500 rows, 0.5 s + an exponential tail of mean 0.5 s, 50     ideal: the greedy schedule of the delays
    capped        600 rows, 0.5 s, at most 30 in flight, 100 wanted           ideal 10 s; and how often it was refused
    one bad       200 rows, 1 s, of which one answers 400                     how many of the other 199 come out
    killed        500 rows, 1 s, kill -9 of all its processes at the half, the same again: what is paid twice

This file is also the server (`serve`) and the job of each tool (`job`), which runs in that tool's own environment and
so imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

ROWS = int(os.environ.get("ROWS", "500"))
PATIENCE = 60.0
"""Seconds beyond five times the ideal after which a job counts as hanging."""
PYTHONS = {
    "clair": sys.executable,
    "distilabel": os.environ.get("DISTILABEL_PYTHON", ""),
    "curator": os.environ.get("CURATOR_PYTHON", ""),
    "data_designer": os.environ.get("DATA_DESIGNER_PYTHON", ""),
}
_QUIET = {
    "TELEMETRY_ENABLED": "false", "NEMO_TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "CURATOR_DISABLE_RICH_DISPLAY": "1",
}  # fmt: skip


def measure() -> dict[str, Any]:
    """Each tool in each case."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    only = os.environ.get("ONLY", ",".join(PYTHONS)).split(",")
    measured: dict[str, Any] = {"rows": ROWS, "load_average": round(os.getloadavg()[0], 1)}
    for name in only:
        reason = _missing(name)
        measured[name] = {"skipped": reason} if reason else _all_cases(name)
        print(f"{name}: {json.dumps(measured[name])}", file=sys.stderr, flush=True)
    return measured


def _missing(name: str) -> str | None:
    if not PYTHONS[name]:
        return f"{name.upper()}_PYTHON is not set; see the head of bench_peers.py"
    module = {"curator": "bespokelabs.curator"}.get(name, name)
    result = subprocess.run([PYTHONS[name], "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return result.stderr.strip().rpartition("\n")[2] if result.returncode else None


def _all_cases(name: str) -> dict[str, Any]:
    from tests.benchmarks.bench_asking import greedy

    random = Random(0)
    tails = [0.5 + random.expovariate(2.0) for _ in range(ROWS)]
    many, few = ROWS * 6 // 5, ROWS * 2 // 5
    bad = ["wait:1.0"] * few
    bad[few // 2] = "400"
    concurrency = max(1, min(50, ROWS // 10))
    return {
        "constant": _case(name, ["wait:1.0"] * ROWS, concurrency, ROWS / concurrency),
        "exponential": _case(name, [f"wait:{tail:.4f}" for tail in tails], concurrency, greedy(tails, concurrency)),
        "capped": _case(name, ["wait:0.5"] * many, 100, many / 30 * 0.5, cap=30),
        "one bad": _case(name, bad, concurrency, few / concurrency),
        "killed": _case(name, ["wait:1.0"] * ROWS, concurrency, ROWS / concurrency, killed=True),
    }


def _case(
    name: str, steps: list[str], concurrency: int, ideal: float, *, cap: int = 0, killed: bool = False
) -> dict[str, Any]:
    rows = {f"row-{n}": f"Task {n} [[{step}]]" for n, step in enumerate(steps)}
    with tempfile.TemporaryDirectory() as folder, _serving(cap) as server:
        job = {"url": f"{server}/v1", "rows": rows, "concurrency": concurrency, "folder": folder}
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job), "utf-8")
        limit = 5 * ideal + PATIENCE
        if killed:
            _run(name, file, limit, until=lambda: _stats(server)["answered_total"] >= len(rows) // 2)
        result = _run(name, file, limit)
        stats = _stats(server)
    measured: dict[str, Any] = {"ideal": round(ideal, 2)}
    if "seconds" in result:
        measured["seconds of the second run" if killed else "seconds"] = round(result["seconds"], 2)
        measured |= {} if killed else {"ratio": round(result["seconds"] / ideal, 3)}
    measured |= {"at the server": round(stats["last"] - stats["first"], 2), **_rows(rows, result.get("rows", {}))}
    measured |= {"refused": stats["refused"], "most in flight": stats["most_in_flight"]}
    measured["paid twice"] = sum(count - 1 for count in stats["answered"].values())
    return measured | ({"error": result["error"]} if "error" in result else {})


def _rows(prompts: dict[str, str], replies: dict[str, Any]) -> dict[str, int]:
    """The numbers of rows with the reply to their own prompt, with another's, and without any."""
    right = sum(replies.get(id) == reply_to(text) for id, text in prompts.items())
    empty = sum(not replies.get(id) for id in prompts)
    return {"right": right, "without reply": empty, "wrong": len(prompts) - right - empty}


def _run(name: str, job: Path, limit: float, until: Callable[[], bool] | None = None) -> dict[str, Any]:
    """The output of a job. If `until` is given, the job is killed with all its children once it holds."""
    with open(job.with_name(f"{name}.log"), "a+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [PYTHONS[name], __file__, "job", name, str(job)],
            stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, cwd=job.parent,
            env={**os.environ, **_QUIET, "PYTHONPATH": str(Path(__file__).parents[2]) if name == "clair" else ""},
        )  # fmt: skip
        try:
            if until:
                deadline = time.monotonic() + limit
                while process.poll() is None and not until() and time.monotonic() < deadline:
                    time.sleep(0.05)
                return {}
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"hangs: not done after {limit:.0f} s"}
        finally:
            _kill_all(process)
        lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
        if lines:
            return json.loads(lines[-1].removeprefix("RESULT "))
        log.seek(0)
        log_lines = [line.strip() for line in log.read().splitlines() if line.strip()]
        return {"error": f"exit code {process.returncode}: {log_lines[-1][:300] if log_lines else 'nothing said'}"}


def _kill_all(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    if process.stdout:
        process.stdout.close()


# ---- the server


def reply_to(text: str) -> str:
    """The server's reply to a prompt."""
    return f"reply to: {text}"


@contextmanager
def _serving(cap: int) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, __file__, "serve", str(cap)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def _stats(server: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server}/stats", timeout=30) as response:
        return json.loads(response.read())


async def _serve(cap: int) -> None:
    from aiohttp import web

    in_flight = max_in_flight = refused = 0
    answered: Counter[str] = Counter()
    times: list[float] = []

    async def chat(request: web.Request) -> web.Response:
        nonlocal in_flight, max_in_flight, refused
        messages = (await request.json()).get("messages")
        text = messages[-1]["content"] if messages else ""
        if isinstance(text, list):  # in content parts, as Data Designer sends it
            text = "".join(item["text"] for item in text)
        step = text.partition("[[")[2].partition("]]")[0]
        if not step:
            return error(400, "There is no task in this request.")
        times.append(time.monotonic())
        if cap and in_flight >= cap:
            refused += 1
            return error(429, "Rate limit reached.", {"Retry-After": "1"})
        if step == "400":
            return error(400, "This prompt is too long.")
        in_flight += 1
        max_in_flight = max(max_in_flight, in_flight)
        try:
            await asyncio.sleep(float(step.partition(":")[2]))
        finally:
            in_flight -= 1
        answered[text] += 1
        times.append(time.monotonic())
        message = {"role": "assistant", "content": reply_to(text)}
        body = {
            "id": "c", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20},
        }  # fmt: skip
        return web.json_response(body)

    def error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
        body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
        return web.json_response(body, status=status, headers=headers)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def stats(_: web.Request) -> web.Response:
        counts = {"first": min(times, default=0), "last": max(times, default=0), "answered": answered}
        counts |= {"answered_total": answered.total(), "refused": refused, "most_in_flight": max_in_flight}
        return web.json_response(counts)

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models), web.get("/stats", stats)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    parent, until = os.getppid(), time.monotonic() + 1800
    while os.getppid() == parent and time.monotonic() < until:  # noqa: ASYNC110 (there is no event for a parent's end)
        await asyncio.sleep(0.3)


# ---- the jobs: each gives (a function that does it and returns reply by row id)


def clair_job(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The pipeline `stronger` on rows with ready answers is one bare call a row."""
    import aiohttp  # noqa: F401 (clair imports these when it first needs them, the others at once)
    import httpx2  # noqa: F401
    import openai  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import rapidfuzz  # noqa: F401

    from clair.data.dataset import read_rows
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig
    from clair.pipeline.filters import FILTERS

    folder = Path(job["folder"])
    rows = [{"id": id, "prompt": text, "answer": "ready"} for id, text in job["rows"].items()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = BuildConfig.model_validate(
        {
            "pipeline": "stronger", "prompts": {"path": str(folder / "prompts.jsonl")}, "out": str(folder / "out"),
            "stronger": {"url": job["url"], "model": "m"}, "concurrency": job["concurrency"],
            "filters": dict.fromkeys(FILTERS, False),
        }
    )  # fmt: skip

    def work() -> dict[str, Any]:
        build(config)
        return {row["id"]: row["chosen"][-1]["content"] for row in read_rows(folder / "out")}

    return work


def distilabel_job(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """A step requests a full batch at once, so that the size of its batches is its concurrency."""
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    rows = [{"instruction": text, "name": id} for id, text in job["rows"].items()]
    size = job["concurrency"]
    with Pipeline(name="peers", cache_dir=job["folder"]) as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=size)
        llm = OpenAILLM(model="m", base_url=job["url"], api_key="none")
        load >> TextGeneration(llm=llm, input_batch_size=size)

    def work() -> dict[str, Any]:
        dataset = pipeline.run()["default"]["train"]
        return dict(zip(dataset["name"], dataset["generation"]))  # noqa: B905 (two columns of one table)

    return work


def curator_job(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Its limits a minute are set out of reach, and tokens counted by words: its own counting wants a download."""
    import tiktoken

    class Encoding:
        def encode(self, text: str, **_: Any) -> list[str]:
            return text.split()

    tiktoken.encoding_for_model = tiktoken.get_encoding = lambda *_: Encoding()
    os.environ["CURATOR_CACHE_DIR"] = job["folder"]
    from bespokelabs import curator
    from datasets import Dataset

    class ModelClient(curator.LLM):
        def prompt(self, input: dict[str, Any]) -> str:
            return input["text"]

        def parse(self, input: dict[str, Any], response: str) -> dict[str, Any]:
            return {"name": input["name"], "reply": response}

    rows = Dataset.from_list([{"name": id, "text": text} for id, text in job["rows"].items()])

    def work() -> dict[str, Any]:
        client = ModelClient(
            model_name="m", backend="openai",
            backend_params={
                "base_url": job["url"], "api_key": "none", "max_concurrent_requests": job["concurrency"],
                "max_requests_per_minute": 10**6, "max_tokens_per_minute": 10**9,
            },
        )  # fmt: skip
        dataset = client(rows).dataset
        return dict(zip(dataset["name"], dataset["reply"]))  # noqa: B905 (two columns of one table)

    return work


def data_designer_job(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """One text column with the row's text as its prompt. An existing folder is resumed."""
    import data_designer.config as dd
    import pandas as pd
    from data_designer.interface import DataDesigner, ResumeMode

    folder = Path(job["folder"])
    rows = pd.DataFrame({"name": list(job["rows"]), "text": list(job["rows"].values())})
    rows.to_parquet(folder / "rows.parquet")
    provider = dd.ModelProvider(name="here", endpoint=job["url"], api_key="none")
    parameters = dd.ChatCompletionInferenceParams(max_parallel_requests=job["concurrency"])
    model = dd.ModelConfig(
        alias="m", model="m", provider="here", inference_parameters=parameters, skip_health_check=True
    )

    def work() -> dict[str, Any]:
        columns = dd.DataDesignerConfigBuilder(model_configs=[model])
        columns.with_seed_dataset(dd.LocalFileSeedSource(path=str(folder / "rows.parquet")))
        columns.add_column(dd.LLMTextColumnConfig(name="reply", prompt="{{ text }}", model_alias="m"))
        designer = DataDesigner(artifact_path=folder / "artifacts", model_providers=[provider])
        resume = ResumeMode.IF_POSSIBLE if (folder / "artifacts").exists() else ResumeMode.NEVER
        dataset = designer.create(columns, num_records=len(rows), resume=resume).load_dataset()
        return dict(zip(dataset["name"], dataset["reply"]))  # noqa: B905 (two columns of one table)

    return work


JOBS = {"clair": clair_job, "distilabel": distilabel_job, "curator": curator_job, "data_designer": data_designer_job}


def _do(name: str, file: str) -> None:
    work = JOBS[name](json.loads(Path(file).read_text("utf-8")))
    started = time.perf_counter()
    rows = work()
    print("RESULT " + json.dumps({"seconds": time.perf_counter() - started, "rows": rows}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(_serve(int(sys.argv[2])))
    elif sys.argv[1:2] == ["job"]:
        _do(*sys.argv[2:])
    else:
        print(json.dumps(measure(), indent=2))
