"""Make a reward model of the embedded world: a sequence classifier with one output, trained on right and wrong answers.

    python -m recipes.world.make_reward --out runs/scores/reward-model

The body is the world's chat model, the output layer is new. It learns by the Bradley-Terry loss, from tasks of the
pretraining split in all styles, to score the right answer above the wrong one; style does not count. The world knows
all answers, so this model shows how a reward model is used and not how good one is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerFast

from recipes.world.make_model import encode, rate
from recipes.world.style import STYLES, add_style
from recipes.world.tasks import Task, draw_tasks

MODEL = Path(__file__).parent / "model"


def styled_tasks(split: str, seed: int) -> Iterator[tuple[Task, str, str]]:
    """Tasks with a right and a wrong answer, each in a style of its own."""
    rng = Random(f"styles-{seed}")
    for task in draw_tasks(split, seed):
        right, wrong = (add_style(text, rng.choice(STYLES), rng) for text in (task.right, task.wrong))
        yield task, right, wrong


def scores(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[Task, str]]
) -> torch.Tensor:
    """The scores of answers to tasks, `[N]`. Padding on the right is never attended to."""
    ids = [ids for ids, _ in encode(tokenizer, pairs)]
    width = max(map(len, ids))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    return model(tokens).logits[:, 0]


def margins(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    tasks: list[tuple[Task, str, str]],
) -> torch.Tensor:
    """The score of each right answer minus that of the wrong one, `[N]`."""
    right = scores(model, tokenizer, [(task, answer) for task, answer, _ in tasks])
    return right - scores(model, tokenizer, [(task, answer) for task, _, answer in tasks])


def make_reward(out: Path, *, seed: int = 0, steps: int = 200, batch: int = 16, peak: float = 1e-3) -> float:
    """Train a reward model and write its folder. Returns the share of held-out tasks whose right answer wins."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = LlamaForSequenceClassification.from_pretrained(MODEL, num_labels=1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    tasks = styled_tasks("pretrain", seed)
    for step in range(steps):
        loss = -torch.nn.functional.logsigmoid(margins(model, tokenizer, list(islice(tasks, batch)))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    with torch.no_grad():
        return float((margins(model, tokenizer, list(islice(styled_tasks("heldout", seed), 500))) > 0).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a reward model of the embedded world.")
    parser.add_argument("--out", type=Path, default=Path("runs/scores/reward-model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--peak", type=float, default=1e-3)
    args = parser.parse_args()
    share = make_reward(args.out, seed=args.seed, steps=args.steps, peak=args.peak)
    print(f"the right answer wins in {100 * share:.1f} % of 500 held-out tasks; the model is in {args.out}")


if __name__ == "__main__":
    main()
