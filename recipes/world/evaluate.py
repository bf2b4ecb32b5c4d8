"""Greedy answers of a model to tasks, scored by exact answer.

python -m recipes.world.evaluate MODEL --split validation --count 400
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from recipes.world.tasks import Task, distinct_tasks, is_right, is_wrong_rule

MAX_NEW_TOKENS = 48  # the longest right sentence has fewer than 30


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load model and tokenizer of a saved folder, in float32, ready to generate."""
    disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")


def greedy_answers(folder: Path, tasks: Sequence[Task], *, batch_size: int = 128) -> list[str]:
    """One greedy answer per task, in the given order."""
    return generate_answers(folder, tasks, batch_size=batch_size, max_new_tokens=MAX_NEW_TOKENS)


def generate_answers(
    folder: Path,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """One answer per task of the model in a folder; see `generate_in_memory`."""
    model, tokenizer = load(folder)
    return generate_in_memory(
        model,
        tokenizer,
        tasks,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )


@torch.no_grad()
def generate_in_memory(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """One answer per task, in the given order: greedy at temperature 0, otherwise sampled.

    The model is in evaluation mode, and its tokenizer pads on the left. The seed does not change torch's global random
    state. Batches are made by length.
    """
    conversations = [[{"role": "user", "content": task.prompt}] for task in tasks]
    texts = list(map(str, tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)))
    order = sorted(range(len(tasks)), key=lambda index: len(texts[index]))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    answers = [""] * len(tasks)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[index] for index in rows], return_tensors="pt", padding=True, add_special_tokens=False
            )
            generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]  # its protocol lacks model attributes
            out = generate(**batch, **sampling, max_new_tokens=max_new_tokens)
            new = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(rows, new, strict=True):
                answers[index] = text
    return answers


def scores(tasks: list[Task], answers: list[str]) -> list[float]:
    """1.0 for a right answer and 0.0 for any other, in the given order."""
    return [float(is_right(task, answer)) for task, answer in zip(tasks, answers, strict=True)]


def by_skill(tasks: list[Task], values: list[float]) -> dict[str, float]:
    """The mean of `values` over the tasks of each skill."""
    groups: dict[str, list[float]] = defaultdict(list)
    for task, value in zip(tasks, values, strict=True):
        groups[task.skill].append(value)
    return {skill: sum(group) / len(group) for skill, group in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a model on tasks of the embedded world.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tasks = distinct_tasks(args.split, args.count, args.seed)
    answers = greedy_answers(args.model, tasks)
    right = scores(tasks, answers)
    wrong = [float(is_wrong_rule(task, answer)) for task, answer in zip(tasks, answers, strict=True)]
    print(json.dumps({"right": sum(right) / len(tasks), "wrong_rule": sum(wrong) / len(tasks), "n": len(tasks)}))
    print(json.dumps({"right": by_skill(tasks, right), "wrong_rule": by_skill(tasks, wrong)}))


if __name__ == "__main__":
    main()
