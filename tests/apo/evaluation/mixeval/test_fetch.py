"""Getting the benchmark, from a copy of upstream's repository behind 127.0.0.1 or in a folder: no network here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from apo.evaluation.mixeval import benchmark as mixeval
from apo.evaluation.mixeval import fetch as fetching
from apo.evaluation.mixeval.benchmark import load, load_judge_prompts
from apo.evaluation.mixeval.fetch import fetch, parse_judge_prompts
from clair.core.errors import UserError
from tests.apo.evaluation.evaluating import apo
from tests.apo.evaluation.questions import JUDGE
from tests.clair.building import error_line

# Written as upstream writes its own: lambdas that give messages with f-strings, backslashes and braces in them.
SOURCE = """
############ Judge Prompts ############
gpt_judge_for_closeended_freeform = lambda prompt, gold_ans, response: [
{"role": "system", "content": f"Judge."},
{"role": "user", "content": f\'\'\'[[0.5]] as an \\"example\\".
Q: {prompt}
Gold: {gold_ans}
Answer: {response}
\'\'\'}
]

gpt_judge_for_closeended_multiplechoice = lambda prompt, options, response: [
{"role": "system", "content": "Extract."},
{"role": "user", "content": f\'\'\'[[A]] as an example.\\nQ: {prompt}
{options}
Answer: {response}
\'\'\'}
]
"""
USER = {s: JUDGE[s.replace("-", "_")]["user"] for s in mixeval.SPLITS}
USER["free-form"] = USER["free-form"].replace("example", '"example"')


def sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def upstream(data, tmp_path, monkeypatch) -> Path:
    """A copy of upstream's tree that holds our questions."""
    monkeypatch.setattr(fetching, "FILES_SHA256", mixeval.FILES_SHA256)
    for module in (mixeval, fetching):
        monkeypatch.setattr(module, "JUDGE_SHA256", {split: sha256(text) for split, text in USER.items()})
    tree = tmp_path / "upstream"
    for folder in ("mixeval-hard", "mixeval"):
        target = tree / "mix_eval" / "data" / "mixeval-2024-06-01" / folder
        target.mkdir(parents=True)
        for file in (data / "2024-06-01" / "mixeval-hard").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    (tree / "mix_eval" / "prompts").mkdir()
    (tree / "mix_eval" / "prompts" / "judge_prompts.py").write_text(SOURCE)
    return tree


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP on 127.0.0.1, by a process of its own."""
    code = (
        "import functools, http.server as h\n"
        f"handler = functools.partial(h.SimpleHTTPRequestHandler, directory={str(folder)!r})\n"
        "server = h.ThreadingHTTPServer(('127.0.0.1', 0), handler)\n"
        "print(server.server_address[1], flush=True)\n"
        "server.timeout = 60\n"
        "for _ in range(100): server.handle_request()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_the_fetched_files_are_a_data_folder(upstream, data, tmp_path):
    out = tmp_path / "got"
    with served(upstream) as url:
        result = apo("eval", "fetch-mixeval", out, "--version", "2024-06-01", "--from", url)
    assert result.code == 0, result.err
    assert "wrote 4 files" in result.err
    assert load(out, "2024-06-01") == load(data, "2024-06-01")
    assert dict(load_judge_prompts(out).user) == USER
    sums = json.loads((out / "checksums.json").read_text())
    assert sums["commit"] == mixeval.COMMIT
    assert sums["sha256"]["2024-06-01/mixeval-hard/free-form.json"] == mixeval.FILES_SHA256["2024-06-01", "free-form"]


def test_the_full_benchmark_is_checked_from_then_on(upstream, tmp_path):
    out = tmp_path / "got"
    fetch(out, ["2024-06-01"], ("hard", "full"), f"file://{upstream}")
    assert load(out, "2024-06-01", "full").notes == ()
    fetch(out, ["2024-06-01"], ("hard",), f"file://{upstream}")  # what was known stays known
    file = out / "2024-06-01" / "mixeval" / "free-form.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match="expected"):
        load(out, "2024-06-01", "full")


def test_an_unexpected_file_is_reported_and_nothing_is_stored(upstream, tmp_path):
    file = upstream / "mix_eval" / "data" / "mixeval-2024-06-01" / "mixeval-hard" / "multiple-choice.json"
    file.write_text(file.read_text() + " ")
    expected = mixeval.FILES_SHA256["2024-06-01", "multiple-choice"]
    with pytest.raises(UserError, match=rf"another multiple-choice\.json: its sha256 is .*, expected {expected}"):
        fetch(tmp_path / "got", ["2024-06-01"], ("hard",), f"file://{upstream}")
    assert not (tmp_path / "got").exists()


def answer_and_break_off(server: socket.socket) -> None:
    """Answer one request in chunks, and close the connection within the first."""
    connection, _ = server.accept()
    with connection:
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf")


def test_a_file_that_is_not_there_and_no_network_are_one_line_with_what_to_do(upstream, tmp_path):
    with served(upstream) as url:
        (upstream / "mix_eval" / "prompts" / "judge_prompts.py").unlink()
        message = error_line(apo("eval", "fetch-mixeval", tmp_path / "got", "--version", "2024-06-01", "--from", url))
    assert "judge_prompts.py answers 404" in message
    message = error_line(apo("eval", "fetch-mixeval", tmp_path / "got", "--from", "http://127.0.0.1:9"))
    assert "cannot be reached" in message
    assert "on a machine with network and copy the folder here" in message
    assert "clone github.com/Psycoy/MixEval at 7c52b41" in message
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        cut = threading.Thread(target=answer_and_break_off, args=(server,), daemon=True)
        cut.start()
        with pytest.raises(UserError, match=r"cannot be reached \(IncompleteRead"):
            fetch(tmp_path / "got", ["2024-06-01"], ("hard",), f"http://127.0.0.1:{server.getsockname()[1]}")
        cut.join(10)
    with pytest.raises(UserError, match="no version '2024-07-01'"):
        fetch(tmp_path / "got", ["2024-07-01"], ("hard",), f"file://{upstream}")
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.replace("Gold:", "Golden:"), "another free-form judge message: its sha256 is .* expected"),
        (
            lambda s: s.replace("gpt_judge_for_closeended_multiplechoice", "other"),
            "another multiple-choice judge message",
        ),
        (lambda s: s.replace("{gold_ans}", "{gold_ans!r} {x}"), "cannot be read"),
        (lambda s: s + "x = (", "cannot be read"),
    ],
)
def test_judge_words_that_changed_are_reported(upstream, change, match):
    with pytest.raises(UserError, match=match):
        parse_judge_prompts(change(SOURCE))


def test_upstreams_source_is_read_and_never_run(upstream, tmp_path):
    mark = tmp_path / "ran"
    harmful = f"open({str(mark)!r}, 'w')\n" + SOURCE
    assert parse_judge_prompts(harmful)["free_form"]["user"] == USER["free-form"]
    assert not mark.exists()


def test_the_pinned_address_is_of_the_commit_that_the_hashes_are_of():
    assert f"https://raw.githubusercontent.com/Psycoy/MixEval/{mixeval.COMMIT}" == fetching.BASE
    assert mixeval.COMMIT.startswith("7c52b41")
