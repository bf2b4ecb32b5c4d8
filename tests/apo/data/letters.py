"""A tokenizer of single letters that can write any text, with any chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = ["<|pad|>", "<|text_end|>", "<|start|>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>"]
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] or '' }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def letters(template: str | None = CHATML, eos: str = "<|end|>", merged: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, and of two letters merged, that can write any text, with control tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *([merged] if merged else [])]
    merges = [(merged[0], merged[1])] if merged else []
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(MARKS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


def turn(role, content, **more):
    return {"role": role, "content": content, **more}
