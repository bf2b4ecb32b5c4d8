"""Make the tiny chat model of the embedded world from a fixed seed: tokenizer, pretraining, folder.

    python -m recipes.world.make_model --out recipes/world/model        # about 5 minutes on two quiet cores

The model is a Llama of 0.9 million parameters. First it learns to copy its input (without this, it takes ten times as
long to learn lookups). Then it trains on tasks of the pretraining split only; a fair coin decides for each whether the
answer is right or by the wrong rule. So it knows both answers, and preference training changes which one it gives.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clair.inference.generation.onednn import has_bfloat16
from recipes.world.skills.words import ITEMS, LETTERS
from recipes.world.tasks import Task, draw_tasks

PAD, BOS, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Digits, and letters of all-capital codes, are single tokens, because the model has to compute with them.
SINGLE = Regex(r" ?\d|[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]")
MAX_POSITIONS = 512


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on these texts; it encodes and decodes any Unicode text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SINGLE, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, BOS, END, SYSTEM, USER, ASSISTANT],
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
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, BOS),
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
    )
    return LlamaForCausalLM(config)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token."""
    id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(id, int)
    return id


def training_tasks(seed: int) -> Iterator[tuple[Task, str]]:
    """Tasks of the pretraining split, each with an answer that is right or by the wrong rule, by a fair coin."""
    coin = Random(f"coin-{seed}")
    for task in draw_tasks("pretrain", seed):
        yield task, coin.choice((task.right, task.wrong))


Example = tuple[list[int], int]  # token ids of one conversation; where its answer starts


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[Task, str]]) -> list[Example]:
    """Tokenize one user turn and one assistant turn each, as the chat template renders them."""
    prompts = tokenizer([f"{BOS}{USER}{task.prompt}{END}{ASSISTANT}" for task, _ in pairs])["input_ids"]
    answers = tokenizer([answer + END for _, answer in pairs])["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def echoes(tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> Iterator[list[Example]]:
    """Batches to learn copying from: half repeat a random list, half repeat the rows of a random table, shuffled."""
    rng = Random(f"echoes-{seed}")
    items, digits = [f" {item}" for item in ITEMS], [f" {digit}" for digit in range(10)]
    singles = items + digits + list(LETTERS) + list("0123456789")
    token_ids = dict(zip(singles, (tokenizer(text)["input_ids"] for text in singles), strict=True))
    head, turn = tokenizer(BOS + USER)["input_ids"], tokenizer(END + ASSISTANT)["input_ids"]
    while True:
        length = rng.randint(5, 14)
        batch = []
        for _ in range(size):
            rows = [[text] for text in rng.sample(singles, length)]
            repeated = rows
            if rng.random() < 0.5:
                rows = [[word, rng.choice(digits), str(rng.randrange(10))] for word in rng.sample(items, 4)]
                repeated = rng.sample(rows, 4)
            prompt_ids, answer_ids = (
                [token for row in row_list for text in row for token in token_ids[text]]
                for row_list in (rows, repeated)
            )
            batch.append(([*head, *prompt_ids, *turn, *answer_ids, turn[0]], len(head) + len(prompt_ids) + len(turn)))
        yield batch


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> Iterator[list[Example]]:
    """An endless stream of batches of conversations of similar length, so that there is little padding."""
    source, rng = training_tasks(seed), Random(f"batches-{seed}")
    while True:
        pool = sorted(encode(tokenizer, list(islice(source, 16 * size))), key=lambda example: len(example[0]))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        yield from (pool[start : start + size] for start in starts)


def answer_loss(model: LlamaForCausalLM, batch: list[Example], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens (end of turn included), in nats per token.

    Padding is on the right, where a causal model never attends to it, so no mask is needed.
    """
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in batch])
    hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state
    is_answer = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[is_answer]), labels[:, 1:][is_answer])


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warmup over 5 % of the steps, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (half as many steps as with AdamW), AdamW for embedding and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(inner, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class ProductsInFloat32(TorchFunctionMode):
    """Multiply bfloat16 matrices in float32 and round the result, inside a `with` block.

    For a processor without bfloat16 instructions, where Muon's own products take 25 times as long. Processors that have
    them also add in float32: the results agree up to the order of the sum.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.matmul, torch.addmm) and args[0].dtype == torch.bfloat16:
            return func(*(matrix.float() for matrix in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def pretrain(model: LlamaForCausalLM, data: Iterator[list[Example]], *, pad: int, steps: int, peak: float) -> None:
    """Train the model in place; print the loss every 100 steps."""
    optimizers = make_optimizers(model)
    started, total = time.monotonic(), 0.0
    model.train()
    for step, batch in enumerate(islice(data, steps)):
        loss = answer_loss(model, batch, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
            with nullcontext() if has_bfloat16() else ProductsInFloat32():
                optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {total / 100:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a folder for `from_pretrained`: safetensors, tokenizer, chat template, generation config."""
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
    parser.add_argument("--echo-steps", type=int, default=300, help="number of first steps that learn copying")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = (f"{task.prompt}\n{answer}" for task, answer in islice(training_tasks(args.seed), 20_000))
    tokenizer = make_tokenizer(texts)
    model = make_network(tokenizer, args.seed)
    print(json.dumps({"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}))
    first = islice(echoes(tokenizer, args.seed, args.batch), args.echo_steps)
    data = chain(first, batches(tokenizer, args.seed, args.batch))
    pretrain(model, data, pad=token_id(tokenizer, PAD), steps=args.steps, peak=args.peak)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
