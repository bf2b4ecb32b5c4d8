"""Makes the tiny chat model of the embedded world from a fixed seed: tokenizer, pretraining, folder.

    python -m recipes.world.make_model --out recipes/world/model

The model is a Llama of about a million parameters. It is pretrained on tasks of the pretraining split only; a fair
coin decides for each whether the answer it sees is the right one or the one by the wrong rule. So it can do both,
and which it does is what preference training has to change.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.world.tasks import Task, draw_tasks

PAD, BOS, END, SYSTEM, USER, ASSISTANT = SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Digits stand alone, and so do letters of all-capital codes: what has to be computed with must not hide in a token.
SINGLE = Regex(r" ?\d|[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]")
MAX_POSITIONS = 512


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over these texts: any Unicode text goes through it and back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SINGLE, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def make_network(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def training_tasks(seed: int) -> Iterator[tuple[Task, str]]:
    """Tasks of the pretraining split, each with an answer that is right or by the wrong rule, by a fair coin."""
    coin = Random(f"coin-{seed}")
    for task in draw_tasks("pretrain", seed):
        yield task, coin.choice((task.right, task.wrong))


Example = tuple[list[int], int]  # token ids of one conversation; where its answer starts


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[Task, str]]) -> list[Example]:
    """One user turn and one assistant turn each, as the chat template writes them."""
    prompts = tokenizer([f"{BOS}{USER}{task.prompt}{END}{ASSISTANT}" for task, _ in pairs])["input_ids"]
    answers = tokenizer([answer + END for _, answer in pairs])["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> Iterator[list[Example]]:
    """Batches of conversations without end; those of one batch have similar lengths, so that little is padding."""
    source, rng = training_tasks(seed), Random(f"batches-{seed}")
    while True:
        pool = sorted(encode(tokenizer, list(islice(source, 16 * size))), key=lambda example: len(example[0]))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        yield from (pool[start : start + size] for start in starts)


def answer_loss(model: LlamaForCausalLM, batch: list[Example], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens (end of turn included), in nats a token.

    Padding stands on the right, where a causal model never looks at it, so no mask is needed.
    """
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in batch])
    hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state
    wanted = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: 5 % of the steps to warm up, then a cosine down to nothing."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, size: int, peak: float
) -> None:
    """Trains in place, and prints the loss now and then."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    started, total = time.monotonic(), 0.0
    model.train()
    for step, batch in enumerate(islice(batches(tokenizer, seed, size), steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        loss = answer_loss(model, batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {total / 100:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the folder that `from_pretrained` reads: safetensors, tokenizer, chat template, generation config."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded world's tiny model.")
    parser.add_argument("--out", type=Path, default=Path("recipes/world/model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = (f"{task.prompt}\n{answer}" for task, answer in islice(training_tasks(args.seed), 20_000))
    tokenizer = make_tokenizer(texts)
    model = make_network(tokenizer, args.seed)
    print(json.dumps({"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}))
    pretrain(model, tokenizer, seed=args.seed, steps=args.steps, size=args.batch, peak=args.peak)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
