"""Jobs with a cost computed by hand."""

from __future__ import annotations

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from apo.cost.memory import Job

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def lora(r=4):
    return LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def llama(**sizes):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def job(sizes, rows, **more):
    base = {
        "padded_tokens": 1, "pairs": 1, "pairs_trained": 1, "stands_for": 1, "weight": 4, "compute": 4, "states": 2,
        "checkpointing": False, "accumulates": False, "copies": False, "reference": None,
    }  # fmt: skip
    return Job(sizes=sizes, rows=tuple(rows), **base | more)
