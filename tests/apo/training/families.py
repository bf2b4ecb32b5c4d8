"""Tiny models of several families that take the conversations of tests/apo/conftest.py."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "mistral, window of 12": (MistralConfig, {"sliding_window": 12}),
    "gemma2, soft caps, window of 12": (Gemma2Config, {"sliding_window": 12, "query_pre_attn_scalar": 16}),
}


def tiny(family):
    config, more = FAMILIES[family]
    torch.manual_seed(0)
    options = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 3,
        "pad_token_id": 0,
    }  # fmt: skip
    model_config = config(**options, **more)
    # Gemma 2 selects eager attention by itself. TRL's arm then warns, so both sides use eager.
    model_config._attn_implementation = "eager" if config is Gemma2Config else "sdpa"
    return AutoModelForCausalLM.from_config(model_config, attn_implementation=model_config._attn_implementation)
