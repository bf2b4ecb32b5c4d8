"""Real input: recorded GPT-4 revisions, and a server of another project."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch

from clair.data.contrast import contrast_of
from clair.pipeline.build import build
from recipes.world.replay import read_recordings, replay
from tests.clair import tiny_model
from tests.clair.building import config_for, drops, manifest, pairs, write_prompts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows(shared) -> list:
    return read_recordings(shared)


# ---- recorded revisions


def true_text(row) -> str:
    """The revised solution of the recorded reply, cut out by hand."""
    return row["reply"].partition("{corrected_student_solution}")[2].removeprefix(":").strip()


@pytest.fixture(scope="module")
def replayed(rows, tmp_path_factory) -> Path:
    """All twelve as pairs: without the filters that drop two which allude, one of them for its cut-off loser too."""
    out = tmp_path_factory.mktemp("replay") / "all"
    built = replay(rows, out, filters={"allusion": False, "cut_off": False}, test_fraction=0)
    assert built.failed == 0
    return out


def test_all_recorded_revisions_become_pairs_with_the_true_text_and_contrast_numbers(rows, replayed):
    by_id = {row["id"]: row for row in rows}
    trained_pairs = pairs(replayed)
    assert len(trained_pairs) == len(by_id) == 12
    for pair in trained_pairs:
        row = by_id[pair["id"]]
        assert pair["chosen"] == [{"role": "assistant", "content": true_text(row)}]
        assert pair["rejected"] == [{"role": "assistant", "content": row["rejected"]}]
        assert pair["prompt"] == [{"role": "user", "content": row["prompt"]}]
        assert pair["reasoning"]
        assert pair["contrast"] == contrast_of(true_text(row), row["rejected"])._asdict()
        assert pair["models"] == {"chosen": "gpt-4-0125-preview", "rejected": "prompt file"}
    tokens = manifest(replayed)["tokens"]["reviser"]
    assert tokens["completion"] == sum(row["usage"]["completion_tokens"] for row in rows)


def test_the_contrast_is_what_was_measured_on_real_revisions(replayed):
    """The facts of 20 real replies: Jaccard 0.28 (0.14-0.47), about a third of the words kept, length ratio 0.5-4.8."""
    means = manifest(replayed)["contrast"]
    assert 0.2 < means["jaccard"] < 0.36
    assert 0.25 < means["kept"] < 0.45
    assert all(0.1 < pair["contrast"]["jaccard"] < 0.5 for pair in pairs(replayed))
    assert all(0.5 <= pair["contrast"]["length_ratio"] <= 4.8 for pair in pairs(replayed))


def test_exactly_the_two_that_allude_to_a_correction_are_dropped(rows, tmp_path):
    built = replay(rows, tmp_path / "out")
    assert built.manifest["counts"] == built.manifest["counts"] | {"prompts": 12, "pairs": 10, "dropped": 2}
    assert {row["id"]: f"{row['stage']}.{row['reason']}" for row in drops(tmp_path / "out")} == {
        "uf-00": "filter.allusion",
        "uf-09": "filter.allusion",
    }
    again = replay(rows, tmp_path / "out")  # the endpoint has another port, its replies are the same
    assert again.manifest["tokens"]["reviser"]["reused"] == 12


def test_the_documented_command_replays_them(rows, shared, tmp_path):
    command = [sys.executable, "-m", "recipes.world.replay", "--shared", str(shared), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert "12 recorded revisions" in run.stdout
    assert len(pairs(tmp_path / "out")) == 10


def test_the_command_says_where_it_looked_for_recordings(tmp_path):
    command = [sys.executable, "-m", "recipes.world.replay", "--shared", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: no recordings at {tmp_path}")


def real_text_model(folder: Path, texts: list[str]) -> Path:
    """A tiny Llama with a byte-level tokenizer trained on these texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|begin|>", "<|start|>", "<|end|>"]
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(texts, vocab_size=3000, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"], "pad_token": "<|pad|>"})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    tiny_model.make_model(
        vocab_size=len(tokenizer), max_position_embeddings=4096, initializer_range=0.02
    ).save_pretrained(folder)
    return folder


def test_a_tiny_model_trains_on_the_real_pairs(replayed, tmp_path):
    from apo.training.config import TrainConfig
    from apo.training.train import train

    rows = pairs(replayed)
    texts = [pair[side][0]["content"] for pair in rows for side in ("prompt", "chosen", "rejected")]
    model = real_text_model(tmp_path / "model", texts)
    trainer = {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "max_length": 4096}
    trainer |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trained = train(
        TrainConfig(
            model=str(model),
            dataset=str(replayed),
            objective="apo_zero",
            trainer=trainer,
            out=str(tmp_path / "run"),
        ),
        log=lambda _: None,
    )
    assert trained["data"]["train"] == {"pairs": 12, "dropped": {}}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line for line in lines if "rewards/chosen" in line]
    assert abs(rewards[0]["rewards/chosen"]) < 1e-4  # the anchor
    assert trained["metrics"]["rewards/margins"] > 0
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines if "loss" in line)


def test_datasets_reads_the_real_pairs(replayed):
    assert len(datasets.load_dataset(str(replayed), split="train")) == 12


# ---- `transformers serve`: an OpenAI-compatible server of another project


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The server's URL and the tiny model that it serves."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: install clair-apo[serving]")
    model = tiny_model.save(tmp_path_factory.mktemp("served") / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        until = time.monotonic() + 120
        while not answers(url.removesuffix("/v1") + "/health"):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.2)
        yield url, model
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_target_behind_transformers_serve_gives_pairs(transformers_serve, tmp_path):
    from tests.clair.building import scripted

    url, model = transformers_serve
    prompts = [{"prompt": " ".join(tiny_model.VOCABULARY[: n + 2])} for n in range(8)]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    target = {"url": url, "model": str(model), "temperature": 0.0, "max_tokens": 24}
    with scripted() as reviser:
        config = config_for(tmp_path, reviser.url, target=target, filters={"identical": False}, concurrency=4)
        built = build(config)
        first = pairs(tmp_path / "out")
        assert built.failed == 0
        assert len(first) + len(drops(tmp_path / "out")) == 8
        assert {row["reason"] for row in drops(tmp_path / "out")} <= {"truncated", "empty_reply"}
        assert manifest(tmp_path / "out")["tokens"]["target"]["prompt"] > 0
        for row in first:
            assert set(row["rejected"][0]["content"].split()) <= {*tiny_model.VOCABULARY, "user", "assistant", "system"}
        assert build(config).manifest["tokens"]["target"]["reused"] == 8


@pytest.mark.slow
def test_check_endpoint_finds_transformers_serve_to_be_what_it_is(transformers_serve):
    from clair.inference.endpoint_check import check_endpoints

    url, model = transformers_serve
    checks = {check.name: check for check in check_endpoints([url], model, model=str(model))[url]}
    assert {name for name, check in checks.items() if check.ok is False} == set(), checks
    assert checks["chat template"].ok is True
    assert checks["truncation"].ok is True
    assert checks["tokens a second"].ok is True
