"""Tiny models of many families and random pairs, for packed rows against the plain reference."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from apo.packing.batch import PairBatch
from apo.packing.packed_model import packed_logps

VOCABULARY = 97
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, tied, biased": (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral, sliding window": (MistralConfig, {"sliding_window": 8}),
    "qwen3": (Qwen3Config, {}),
    "gemma2, soft caps and window": (Gemma2Config, {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3, window": (Gemma3TextConfig, {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "granite, scaled logits": (GraniteConfig, {"logits_scaling": 3.0}),
}


def tiny(family: str = "llama"):
    config, options = FAMILIES[family]
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(
        config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, **options,
        )
    )  # fmt: skip


def pairs(*shapes, seed=0):
    """Pairs of random tokens. A shape counts those of the prompt, of the responses' common prefix, and of each rest."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    rows = []
    for prompt, shared, chosen, rejected in shapes:
        both = draw(shared)
        # The rests begin with different tokens, so that `shared` is what is shared.
        rows.append({"prompt_ids": draw(prompt), "chosen_ids": [*both, 3, *draw(chosen - 1)] if chosen else both,
                     "rejected_ids": [*both, 4, *draw(rejected - 1)] if rejected else both})  # fmt: skip
    return rows


def batch_of(examples):
    return PairBatch(examples, DataCollatorForPreference(pad_token_id=0))


def stacked(examples):
    return batch_of(examples).stacked


def packed(model, examples):
    """`PairLogps` of examples in one packed row, as the trainer packs them."""
    return packed_logps(model, batch_of(examples).row(torch.device("cpu")))


def gradients(model, logps, seed=5):
    weights = torch.randn(2, len(logps.chosen), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    (torch.stack([logps.chosen, logps.rejected]) * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


SHAPES = [(7, 0, 9, 14), (12, 3, 10, 13), (17, 10, 11, 12), (3, 0, 1, 1), (22, 1, 13, 2), (5, 6, 0, 4)]
