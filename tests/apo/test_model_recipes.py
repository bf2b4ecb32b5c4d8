"""The recipes under recipes/models, planned on a folder that holds the model's config and no weight."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from apo import fit
from tests.apo.conftest import WORDS, make_tokenizer
from tests.apo.test_cli import call
from tests.apo.test_fit import LLAMA_3_8B

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "models").glob("*.yaml"))
HARDWARE = {
    "llama3_8b_full": (["--processes", "8"], ("A100 80GB", "H100 80GB")),
    "llama3_8b_lora": ([], ("A100 80GB", "H100 80GB")),
    "llama3_8b_qlora": ([], ("RTX 4090 24GB",)),
}


@pytest.fixture(scope="module")
def llama_3_8b(tmp_path_factory) -> Path:
    """Llama-3-8B's config with a tiny tokenizer, and 64 pairs of 600 tokens a response."""
    from transformers import LlamaConfig

    out = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**LLAMA_3_8B, max_position_embeddings=8192)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    rng = random.Random(0)
    texts = [[" ".join(rng.choices(WORDS, k=n)) for n in (150, 600, 600)] for _ in range(64)]
    rows = [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts]
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_every_recipe_fits_the_hardware_that_it_names(llama_3_8b, tmp_path, monkeypatch, capsys):
    assert [file.stem for file in RECIPES] == sorted(HARDWARE)
    tiny = fit.Device("this machine: CPU", fit.GIB, 1e9, is_gpu=False)
    monkeypatch.setattr(fit, "this_machine", lambda: tiny)
    for file in RECIPES:
        more, named = HARDWARE[file.stem]
        text = file.read_text("utf-8")
        assert f"{file.name} --dry-run {' '.join(more)}".strip() in text, (
            f"{file.name} does not say how it was computed"
        )
        given = [
            "--set",
            f"model={llama_3_8b}",
            "--set",
            f"dataset={llama_3_8b}/pairs.jsonl",
            "--out",
            tmp_path / "run",
        ]
        assert call(monkeypatch, "train", file, "--dry-run", *more, *given) == 2  # this machine is too small
        told, refused = capsys.readouterr()
        assert "parameters: 8,030,261,248" in told
        lines = {line[2:].partition(":")[0]: line for line in told.splitlines() if line.startswith("# ")}
        assert [", fits, about" in lines[gpu] for gpu in named] == [True] * len(named), told
        assert ("does NOT fit" in lines["RTX 4090 24GB"]) == (file.stem == "llama3_8b_full")
        assert refused.splitlines()[-1].startswith("error: the run needs about ")
        assert "Traceback" not in refused
    print(f"looked at {len(RECIPES)} recipes")
