"""A tiny random Llama with a tokenizer of its own, made on the spot: no hub, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

QUESTION = ("what", "is", "the", "answer", "to", "this", "question", "please", "tell", "me")
VOCABULARY = (*QUESTION, "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPECIAL = ("<|pad|>", "<|begin|>", "<|start|>", "<|end|>", "<|unk|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)


def make_tokenizer(**changes: Any):
    """A word-level tokenizer with a chat template that writes the BOS itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL, "user", "assistant", "system", *VOCABULARY]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As Llama's: text that is tokenized by itself gets a BOS, so that a template with one must be tokenized without.
    raw.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin|>", unk_token="<|unk|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|pad|>"]})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|end|>", "<|pad|>", TEMPLATE
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def make_model(seed: int = 0, **changes: Any):
    """Weights large enough that the next token is far from certain and far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
    config = LlamaConfig(**sizes | tokens | more | changes)
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config).eval()


def save(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A model folder as save_pretrained writes it."""
    make_model(seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
