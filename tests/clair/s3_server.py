"""An S3-compatible server of this machine: moto's, a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.clair.building import ROOT, SPLIT_FILES

FILES = (*SPLIT_FILES, "dropped.jsonl", "README.md")
KEYS = {"AWS_ACCESS_KEY_ID": "an-access-key-id", "AWS_SECRET_ACCESS_KEY": "a-very-secret-key"}
ENVIRONMENT = {**KEYS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
SHORT = "from clair.storage import url_lock; url_lock.LEASE, url_lock.BEAT = 5.0, 0.5"
"""A sitecustomize.py that shortens the time after which runs on URLs count as dead."""


@contextlib.contextmanager
def s3_server(port: int = 0, **environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """moto's server for the length of a `with` block: its URL and process."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        until = time.monotonic() + 60
        while True:
            assert process.poll() is None, "moto's server did not start"
            assert time.monotonic() < until, "moto's server does not answer"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait(10)


def machines_at(url: str, customized: Path) -> dict[str, str]:
    """The environment of machines that use a bucket `pairs` of the server, and Python as the folder customizes it."""
    bucket(url, "pairs")
    return {**ENVIRONMENT, "AWS_ENDPOINT_URL": url, "PYTHONPATH": f"{customized}{os.pathsep}{ROOT}"}


def bucket(url: str, name: str) -> None:
    in_s3(url, f"import boto3; boto3.client('s3').create_bucket(Bucket={name!r})")


def in_s3(url: str, code: str) -> str:
    """The output of Python code in a process whose environment names the server."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL": url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def fetched(url: str, out: str) -> dict[str, bytes]:
    code = (
        "from clair.storage.object_store import Store\nimport json\n"
        f"print(json.dumps([data.hex() for data in Store({out!r}).get_all({list(FILES)!r})]))"
    )
    return dict(zip(FILES, map(bytes.fromhex, json.loads(in_s3(url, code))), strict=True))
