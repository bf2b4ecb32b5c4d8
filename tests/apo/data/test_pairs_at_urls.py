"""Pairs to train on, to score and to look at, at a URL: the rows of the folder or file."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from apo.analysis.features import read_rows
from apo.data.pair_rows import read_pair_rows
from apo.data.sources import Source, load_eval, load_train, split_names
from apo.guarantees.calibrate import read_ids
from apo.training.config import TrainConfig
from apo.training.train import train
from clair.core.errors import UserError
from tests.apo.conftest import make_pairs
from tests.browser.synthetic import synthetic_pairs, write_dataset


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pairs") / "pairs", synthetic_pairs(40, characters=60), 3)


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(original, tmp_path / "bucket" / "pairs")


def test_a_folder_at_a_url_gives_the_pairs_of_the_folder(folder):
    local, remote = ([Source(path=path)] for path in (str(folder), f"file://{folder}"))
    assert load_train(remote, 0).to_list() == load_train(local, 0).to_list()
    assert load_eval(remote, True).to_list() == load_eval(local, True).to_list()
    assert split_names(remote[0].path) == split_names(local[0].path) == ["train", "test"]
    assert read_rows([remote[0].path]) == read_rows([local[0].path])
    assert read_pair_rows(remote[0].path) == read_pair_rows(local[0].path)
    assert read_ids(remote[0].path) == read_ids(local[0].path)
    assert len(read_ids(local[0].path)) == 40


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_file_at_a_url_gives_the_pairs_of_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    file = tmp_path / name
    content = "".join(json.dumps(row) + "\n" for row in make_pairs(6)).encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    local, remote = ([Source(path=path)] for path in (str(file), f"file://{file}"))
    assert load_train(remote, 0).to_list() == load_train(local, 0).to_list()
    assert load_eval(remote, True) is None
    assert read_rows([remote[0].path]) == read_rows([local[0].path])


def test_a_url_that_holds_a_secret_or_nothing_is_reported_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    for url in ("s3://me:hunter22@bucket/pairs", "https://host/pairs.jsonl?X-Amz-Signature=hunter22"):
        with pytest.raises(UserError, match="its URL contains a password or a query") as caught:
            load_train([Source(path=url)], 0)
        assert "hunter22" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot read .*: nothing is there"):
        load_train([Source(path=f"file://{tmp_path}/none")], 0)


@pytest.mark.slow
def test_a_run_on_pairs_at_a_url_is_the_run_on_the_file_and_is_known_again(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(6)))
    trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none"}
    runs = {}
    for name, path in (("here", str(file)), ("there", f"file://{file}")):
        config = TrainConfig(model=str(model_dir), dataset=path, out=str(tmp_path / name), trainer=trainer, probe=0)
        runs[name] = train(config)
        assert runs[name]["recipe"]["dataset"][0]["path"] == path
        assert train(config) == runs[name]
    assert runs["there"]["data"] == runs["here"]["data"]
    assert runs["there"]["metrics"]["loss"] == runs["here"]["metrics"]["loss"]
