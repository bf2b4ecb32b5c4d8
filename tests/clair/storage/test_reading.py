"""Commands that read a dataset, given its URL: what they do is what they do with the folder."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from clair.core.errors import UserError
from clair.core.files import write_json
from clair.data.dataset import load_pairs, read_manifest, read_rows, split_file
from clair.data.prompt_sources import PromptSource, read_prompts
from clair.reporting.review import fingerprint
from clair.storage import object_store as storage
from clair.storage import url_lock
from clair.storage.location import Location
from clair.storage.object_store import StorageError, Store
from tests.browser.synthetic import synthetic_pairs, write_dataset
from tests.clair.building import clair, error_line

PAIRS = 30


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("reading") / "pairs", synthetic_pairs(PAIRS, characters=60), 3)


@pytest.fixture
def folder(original, tmp_path, monkeypatch) -> Path:
    """The dataset as the bucket has it. Fetched copies go to another folder."""
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(url_lock, "LEASE", 1.0)
    monkeypatch.setattr(url_lock, "BEAT", 0.1)
    monkeypatch.setattr(storage, "_PATIENCE", 0.2)
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(original, tmp_path / "bucket" / "pairs")


@pytest.fixture
def url(folder) -> str:
    return f"file://{folder}"


def bytes_of(folder: Path) -> dict[str, bytes]:
    names = ("manifest.json", "README.md", "dropped.jsonl", split_file("train"), split_file("test"))
    return {name: (folder / name).read_bytes() for name in names}


def mark(folder: Path, decisions: Path, count: int = 5) -> Path:
    ids = [row["id"] for row in read_rows(folder)][:count]
    content = {"format": 1, "dataset": fingerprint(read_manifest(folder)), "decisions": dict.fromkeys(ids, "drop")}
    write_json(decisions, content)
    return decisions


def _cell_words(output: str) -> list[str]:
    """The words of an output, without the frames of tables."""
    return re.sub("[━─┏┓┡┩└┘┳╇┴]", "", output).split()


@pytest.mark.parametrize(
    "command", [["stats"], ["show", "-n", "2"], ["show", "--split", "test"], ["push", "org/name"]], ids=" ".join
)
def test_a_url_is_read_as_the_folder_is(folder, url, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    local, remote = (clair(command[0], location, *command[1:]) for location in (folder, url))
    assert (local.code, remote.code) == (0, 0), remote
    assert _cell_words(remote.out.replace(url, str(folder))) == _cell_words(local.out)
    assert str(PAIRS) in local.out or command[0] == "show"


def test_the_page_and_the_rows_of_a_url_are_those_of_the_folder(folder, url, tmp_path):
    result = clair("report", url)
    assert result.code == 0, result
    assert f"clair keep {url} decisions.json" in result.out
    assert clair("report", folder).code == 0
    assert (tmp_path / "pairs-report.html").read_bytes() == (folder / "report.html").read_bytes()
    for location, file in ((folder, "here.jsonl"), (url, "there.jsonl")):
        assert clair("export", location, tmp_path / file).code == 0
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert (tmp_path / "there.jsonl").stat().st_size > 1000


def test_a_dataset_is_fetched_once_and_anew_where_it_has_changed(folder, url, tmp_path, monkeypatch):
    fetched = []
    fetch = Store.fetch
    monkeypatch.setattr(Store, "fetch", lambda self, name, file: (fetched.append(name), fetch(self, name, file)))
    rows = list(read_rows(url))
    assert rows == list(read_rows(folder))
    assert load_pairs(url).to_list() == load_pairs(folder).to_list()
    assert sorted(fetched) == ["", "README.md", split_file("test"), split_file("train"), "dropped.jsonl"]
    assert clair("keep", folder, mark(folder, tmp_path / "d.json")).code == 0
    assert list(read_rows(url)) == list(read_rows(folder)) == rows[5:]
    assert len(list(Location(url).cache_folder("datasets").iterdir())) == 1


def test_the_prompts_of_a_dataset_are_read_by_its_url_too(folder, url):
    local, remote = (list(read_prompts(PromptSource(path=path))) for path in (str(folder), url))
    assert local == remote
    assert len(local) > 20


def test_a_review_at_a_url_is_that_of_the_folder(folder, url, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "here")
    decided = mark(copy, tmp_path / "d.json")
    original = bytes_of(copy)
    aside = clair("keep", url, decided, "--out", tmp_path / "aside")
    assert aside.code == 0, aside
    assert bytes_of(folder) == original
    assert clair("keep", copy, decided).code == 0
    result = clair("keep", url, decided)
    assert result.code == 0, result
    assert bytes_of(folder) == bytes_of(copy) == bytes_of(tmp_path / "aside") != original
    assert f"{PAIRS - 5} (" in result.out
    assert clair("keep", url, decided).code == 0
    assert bytes_of(folder) == bytes_of(copy)


@pytest.mark.parametrize("uploads", range(5))
def test_a_review_at_a_url_that_was_cut_off_is_finished_by_the_same_command(
    folder, url, tmp_path, monkeypatch, uploads
):
    copy = shutil.copytree(folder, tmp_path / "here")
    decided = mark(copy, tmp_path / "d.json")
    assert clair("keep", copy, decided).code == 0
    upload, left = Store.upload, [uploads]

    def cut_off(self, name, file):
        if not left[0]:
            raise StorageError(f"cannot write {self.name}")
        left[0] -= 1
        upload(self, name, file)

    monkeypatch.setattr(Store, "upload", cut_off)
    assert error_line(clair("keep", url, decided)) == f"cannot write {url}"
    assert bytes_of(folder) != bytes_of(copy)
    monkeypatch.setattr(Store, "upload", upload)
    if uploads % 2:  # on another machine
        shutil.rmtree(tmp_path / "cache")
    assert clair("keep", url, decided).code == 0
    assert bytes_of(folder) == bytes_of(copy)


def test_datasets_that_cannot_be_read_or_reviewed_at_a_url_are_one_line(folder, url, tmp_path):
    decided = mark(folder, tmp_path / "d.json")
    refused = error_line(clair("keep", url, decided, "--out", "s3://bucket/other"))
    assert refused == "--out s3://bucket/other is a URL; give a folder, or leave --out away to change in place"
    content = json.loads(decided.read_text())
    write_json(decided, content | {"decisions": {"nobody": "drop"}})
    assert error_line(clair("keep", url, decided)).startswith(f"{url} has no pair 'nobody'")
    (folder / "dropped.jsonl").write_text("")
    assert f"{url}: dropped.jsonl does not match its manifest.json" in error_line(clair("report", url))
    (folder / "manifest.json").write_text("[]")
    assert error_line(clair("stats", url)).startswith(f"{url}/manifest.json is damaged (list)")
    (folder / "manifest.json").unlink()
    for command in (["stats"], ["show"], ["report"], ["keep", decided], ["next", "--model", "m", "--out", "o"]):
        message = error_line(clair(command[0], url, *command[1:]))
        assert message == f"{url} holds no finished dataset (no manifest.json); give a folder made by `clair build`"


def test_a_name_with_brackets_is_printed_as_it_is(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    renamed = folder.rename(folder.with_name("pairs[a]"))
    assert f" {renamed} " in clair("stats", renamed).out


@pytest.mark.parametrize("name", ["../../../outside.txt", "/{tmp}/outside.txt"])
def test_a_manifest_cannot_have_files_put_elsewhere(folder, url, tmp_path, name):
    name = name.replace("/{tmp}", str(tmp_path))
    manifest = read_manifest(folder)
    write_json(folder / "manifest.json", {**manifest, "files": {**manifest["files"], name: "0" * 64}})
    with pytest.raises(UserError, match=r"its manifest\.json is none of `clair build`"), Location(url).local_copy():
        pass
    assert not list(tmp_path.rglob("outside.txt*"))


class _Files(BaseHTTPRequestHandler):
    """Files by path and query, each with its headers."""

    files: ClassVar[dict[str, tuple[str, dict[str, str]]]] = {}

    def do_GET(self) -> None:
        text, headers = self.files[self.path]
        self.send_response(200)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text.encode())

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def web(tmp_path, monkeypatch) -> Iterator[str]:
    """The address of a web server of `_Files.files`."""
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_Files, "files", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@pytest.mark.parametrize("version", ["Last-Modified", "ETag", None])
def test_a_file_on_the_web_that_has_changed_is_read_anew_whatever_the_server_says_of_it(web, version):
    for number, text in enumerate(("cats", "dogs")):
        stamp = {"Last-Modified": f"Mon, 30 Nov 2026 0{number}:00:00 GMT", "ETag": f'"{number}"'}
        headers = {version: stamp[version]} if version else {}
        _Files.files["/p.jsonl"] = (json.dumps({"prompt": text}) + "\n", headers)
        (prompt,) = read_prompts(PromptSource(path=f"{web}/p.jsonl"))
        assert prompt.messages[0]["content"] == text


def test_two_files_on_the_web_that_only_their_queries_distinguish_are_two(web):
    headers = {"ETag": '"1"'}
    for name in ("cats", "dogs"):
        _Files.files[f"/p.jsonl?v={name}"] = (json.dumps({"prompt": name}) + "\n", headers)
    for name in ("cats", "dogs", "cats"):
        (prompt,) = read_prompts(PromptSource(path=f"{web}/p.jsonl?v={name}"))
        assert prompt.messages[0]["content"] == name
