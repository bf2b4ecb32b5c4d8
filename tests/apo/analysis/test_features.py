"""phi: the vector that the LM head sees, at the last token that is no padding, computed once and kept by content."""

from __future__ import annotations

import json

import pytest
import torch

from apo.analysis import features
from apo.analysis.features import NAMES, Features, compute_features, encode_rows, last_hidden, read_rows
from apo.data.sources import Source, load_train
from apo.data.tokenize import eos_ids, tokenize
from apo.models import tensor_cache as cache
from clair.core.errors import UserError
from tests.apo.conftest import TEMPLATE, make_model, make_pairs, make_tokenizer


def tiny(family: str):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **sizes)
        return transformers.GPT2LMHeadModel(config).eval()
    if family == "opt":
        config = transformers.OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, **sizes
        )
        return transformers.OPTForCausalLM(config).eval()
    if family == "mistral":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.MistralConfig(num_key_value_heads=2, **shape, **sizes)
        return transformers.MistralForCausalLM(config).eval()
    return make_model().eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
def test_the_lm_head_of_phi_are_the_logits(family):
    model = tiny(family)
    with torch.no_grad():
        for norm in (m for m in model.modules() if "norm" in type(m).__name__.lower()):
            norm.weight.mul_(1.7)  # a second norm would change the values
        rows = [[1, 5, 9, 12, 3], [1, 7, 3]]
        phi = last_hidden(model, rows)
        for row, states in zip(rows, phi, strict=True):
            logits = model(torch.tensor([row])).logits[0, -1]
            assert torch.allclose(model.get_output_embeddings()(states[len(row) - 1]), logits, atol=1e-5)


@pytest.fixture
def tokenized(pairs):
    tokenizer = make_tokenizer()
    return tokenize(pairs, tokenizer, None, eos_ids(tokenizer)).dataset


def test_each_feature_is_that_of_the_pair_alone(tokenized, monkeypatch):
    """In a batch with padding as in one without: last token of the prompt, last of each response, mean of each."""
    model = make_model().eval()
    monkeypatch.setattr(features, "BATCH_TOKENS", 100)
    actual = compute_features(tokenized, model)
    with torch.no_grad():
        for index, row in enumerate(tokenized):
            for name in ("chosen", "rejected"):
                prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
                states = model.model(torch.tensor([prompt + answer])).last_hidden_state[0]
                assert torch.allclose(actual.prompt[index], states[len(prompt) - 1], atol=1e-5)
                assert torch.allclose(getattr(actual, name)[index], states[-1], atol=1e-5)
                assert torch.allclose(getattr(actual, f"{name}_mean")[index], states[len(prompt) :].mean(0), atol=1e-5)
                both = zip(row["chosen_ids"], row["rejected_ids"], strict=False)
                tail = states[len(prompt) + [a == b for a, b in both].index(False) :]
                total = sum(weight * state for weight, state in enumerate(tail, 1)) / sum(range(1, len(tail) + 1))
                assert torch.allclose(getattr(actual, f"{name}_cumulative")[index], total, atol=1e-5)


def test_they_are_computed_once_and_anew_where_weights_or_ids_change(tokenized, monkeypatch, tmp_path):
    calls, messages = [], []
    real = features.encode
    monkeypatch.setattr(features, "encode", lambda model, rows: calls.append(len(rows)) or real(model, rows))
    monkeypatch.setattr(features, "CHUNK_PAIRS", 10)
    model = make_model()
    first = compute_features(tokenized, model, tmp_path, messages.append)
    assert calls == [10, 10, 4]
    assert messages[-1] == "features: 24 of 24 pairs"
    again = compute_features(tokenized, make_model(), tmp_path, messages.append)
    assert len(calls) == len(messages) == 3
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in NAMES)
    assert again.model == first.model
    compute_features(tokenized.select(range(20)), model, tmp_path)
    assert calls == [10, 10, 4]
    reseeded = compute_features(tokenized, make_model(seed=1), tmp_path)
    assert calls[3:] == [10, 10, 4]
    assert reseeded.model != first.model
    damaged = next(tmp_path.rglob("*.safetensors"))
    damaged.write_bytes(b"torn")
    compute_features(tokenized, model, tmp_path)
    compute_features(tokenized, make_model(seed=1), tmp_path)
    assert len(calls) == 7


def test_the_training_state_of_the_model_is_left_as_it_was(tokenized):
    model = make_model().train()
    compute_features(tokenized, model)
    assert model.training


def test_an_adapter_has_features_of_its_own(tokenized, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = compute_features(tokenized, make_model(), tmp_path)
    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    untouched = compute_features(tokenized, tuned, tmp_path)
    assert torch.allclose(untouched.chosen, plain.chosen, atol=1e-5)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    changed = compute_features(tokenized, tuned, tmp_path)
    assert not torch.allclose(changed.chosen, plain.chosen, atol=1e-3)
    assert changed.model != plain.model


def test_pairs_of_files_come_with_their_labels_and_features(model_dir, tmp_path):
    rows = make_pairs(6)
    for index, row in enumerate(rows):
        row |= {"user": index % 2, "score_chosen": 2.0, "extra": "kept"}
        del row["id"]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = []
    labelled_pairs = encode_rows(read_rows([str(tmp_path / "some.jsonl")]), str(model_dir), messages.append)
    assert isinstance(labelled_pairs.features, Features)
    assert len(labelled_pairs.rows) == len(labelled_pairs.features) == len(labelled_pairs.tokenized) == 6
    assert [row["user"] for row in labelled_pairs.rows] == ["0", "1"] * 3
    assert {row["source"] for row in labelled_pairs.rows} == {"some"}
    assert labelled_pairs.rows[0]["score_chosen"] == 2.0
    assert len({row["id"] for row in labelled_pairs.rows}) == 6
    assert labelled_pairs.rows[0]["extra"] == "kept"


def test_tools_are_part_of_the_prompt_that_is_scored_and_calls_may_differ_in_their_arguments(tmp_path):
    """Features read what `apo train` reads: the tools, and calls whose arguments Arrow could not put in one column."""
    template = "{% if tools %}<|start|>system\n{{ tools[0]['name'] }}<|end|>{% endif %}" + TEMPLATE
    template = template.replace("m['content'] }}", "m['content'] }}{{ m.tool_calls[0].arguments.x if m.tool_calls }}")
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(template).save_pretrained(tmp_path / "model")
    rows = make_pairs(4)
    rows[0] |= {"tools": [{"name": "one", "parameters": {"x": {"default": 1}}}]}
    rows[1] |= {"tools": [{"name": "two", "parameters": {"x": {"default": "a"}, "y": None}}]}
    for row, x in zip(rows, (7, "six", None), strict=False):
        row["prompt"] += [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": x}}]}]
        row["prompt"] += [{"role": "user", "content": "what"}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = encode_rows(read_rows([str(tmp_path / "some.jsonl")]), str(tmp_path / "model"))
    trained = tokenize(
        load_train([Source(path=str(tmp_path / "some.jsonl"))], 0), make_tokenizer(template), None, frozenset([3])
    ).dataset
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert scored.tokenized[column][:] == trained[column][:]
    first, second = (make_tokenizer(template).decode(ids) for ids in scored.tokenized["prompt_ids"][:2])
    assert first != second
    assert [row.get("tools") for row in scored.rows] == [row.get("tools") for row in rows]
    assert scored.rows[1]["prompt"] == rows[1]["prompt"]


def test_pairs_longer_than_the_context_are_left_out_and_reported(model_dir, tmp_path):
    rows = make_pairs(4)
    rows[2]["chosen"][0]["content"] = " ".join(["one"] * 300)
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = []
    labelled_pairs = encode_rows(read_rows([str(tmp_path / "some.jsonl")]), str(model_dir), messages.append)
    assert [row["id"] for row in labelled_pairs.rows] == ["p0", "p1", "p3"]
    assert len(labelled_pairs.features) == 3
    assert "1 pairs are left out: they are longer than the model's context" in messages


def test_a_dataset_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"dataset nowhere\.jsonl does not exist"):
        read_rows(["nowhere.jsonl"])


def test_the_cache_keeps_nothing_that_is_not_a_number(tokenized, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    compute_features(tokenized, model, tmp_path)
    key = next(tmp_path.rglob("*.safetensors")).stem
    assert cache.load(tmp_path, key, dict.fromkeys(NAMES, (24, 32))) is None
