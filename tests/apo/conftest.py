"""A tiny random Llama with its own tokenizer, made on the spot: no hub, no network."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
VOCABULARY = [*NUMBERS, "plus", "minus", "is", "are", "the", "a", "of", "what", "answer", "question"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


# Upstream's warnings that nothing here can prevent, one by one.
UNAVOIDABLE = [
    # peft 0.21 and TRL 1.16 still say gradient_checkpointing, which transformers 5.23 renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
]


def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder):
            for warning in UNAVOIDABLE:
                item.add_marker(pytest.mark.filterwarnings(warning))


def make_tokenizer(template: str | None = TEMPLATE, eos: str | None = "<|end|>", pad: str | None = "<|pad|>"):
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|begin|>", "<|start|>", "<|end|>", "<|unk|>"]
    vocabulary = {word: i for i, word in enumerate([*special, "user", "assistant", "system", "\n", *VOCABULARY])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin|>", unk_token="<|unk|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|pad|>"]})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = eos, pad, template
    return tokenizer


def make_model(seed: int = 0, **options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    config = LlamaConfig(**sizes | tokens | {"num_key_value_heads": 2, "max_position_embeddings": 256} | options)
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config)


TRAINER = {"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2}
"""The trainer options of the fixture `recipe`."""


def make_pairs(n: int = 24, seed: int = 0) -> list[dict]:
    """Pairs of differing lengths. Winners count; losers do not."""
    rng = random.Random(seed)

    def phrase(low: int, high: int) -> str:
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(low, high)))

    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", "what is " + phrase(1, 8)),
            "chosen": turn("assistant", "the answer is " + phrase(1, 9)),
            "rejected": turn("assistant", "a question " + phrase(1, 9)),
            "id": f"p{i}",
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session", autouse=True)
def _isolated_cache(tmp_path_factory):
    """Put the cache of `datasets` among pytest's files."""
    import datasets

    original = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = original


@pytest.fixture(autouse=True)
def _isolated_reference_cache(tmp_path, monkeypatch):
    """Cache reference log-probs among the test's files."""
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A folder with the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs():
    from datasets import Dataset

    return Dataset.from_list(make_pairs())


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A dataset folder of 24 pairs with 6 held out, as `clair build` lays it out."""
    from datasets import Dataset

    out = tmp_path_factory.mktemp("pairs")
    (out / "data").mkdir()
    for split, rows in (("train", make_pairs(24)), ("test", make_pairs(6, seed=5))):
        Dataset.from_list(rows).to_parquet(out / "data" / f"{split}-00000-of-00001.parquet")
    return out


@pytest.fixture
def recipe(tmp_path, model_dir, folder):
    """A recipe's keys, to be changed by a test."""
    return {"model": str(model_dir), "dataset": str(folder), "trainer": dict(TRAINER), "out": str(tmp_path / "run")}


def apart(first, second):
    """The distance of two sets of weights of the same names, relative to the norm of the first."""
    assert set(first) == set(second)
    distance = sum(float((first[name].float() - second[name].float()).norm() ** 2) for name in first) ** 0.5
    return distance / sum(float(weight.float().norm() ** 2) for weight in first.values()) ** 0.5


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
