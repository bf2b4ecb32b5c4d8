"""A real server as the target, where one is installed.

The environment variable CLAIR_TEST_SERVER holds the command that starts it, with {port} in the place of the port:

    python -m tests.clair.inference.llama_server SmolLM2-135M-Instruct.Q4_1.gguf {port}     # needs xllamacpp
    vllm serve SmolLM2-135M-Instruct --port {port}
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from clair.inference.endpoint_check import check_endpoints
from clair.pipeline.build import build
from tests.clair.building import config_for, manifest, pairs, write_prompts

COMMAND = os.environ.get("CLAIR_TEST_SERVER", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMMAND, reason="no server: CLAIR_TEST_SERVER holds no command that starts one"),
]
START_SECONDS = 300


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The URL of the server, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(shlex.split(COMMAND.format(port=port)), stdout=output, stderr=output)
        try:
            for _ in range(START_SECONDS):
                if process.poll() is not None:
                    pytest.fail(f"the server ended: {log.read_text('utf-8', 'replace')[-2000:]}")
                try:
                    urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                    break
                except (URLError, OSError):
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def test_a_real_server_passes_its_check_and_its_answers_are_paid_for_once(url, tmp_path):
    (checks,) = check_endpoints([url]).values()
    assert [check for check in checks if check.ok is False] == []
    assert next(check for check in checks if check.name == "samples").ok
    prompts = [
        {"id": f"p{n}", "prompt": f"Write a sentence about {n} birds.", "better": f"{n} birds."} for n in range(6)
    ]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    target = {"url": url, "model": checks[0].message, "temperature": 0.7, "max_tokens": 256}
    columns = {"path": str(tmp_path / "prompts.jsonl"), "columns": {"stronger": "better"}}
    config = config_for(tmp_path, url, pipeline="stronger", prompts=columns, target=target, reviser=None)
    build(config)
    rows = pairs(tmp_path / "out")
    assert len(rows) >= 3
    assert all(row["rejected"][0]["content"].strip() for row in rows)
    build(config, update=True)
    assert pairs(tmp_path / "out") == rows
    assert manifest(tmp_path / "out")["tokens"]["target"]["calls"] == 0
