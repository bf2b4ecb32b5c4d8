"""Sample answers: the model answers the same few prompts greedily at every inspection, so that a reader sees changes.

Each answer is a line of samples.jsonl: step, prompt (its number), text (of the prompt), answer, tokens, and if the
answer ended. `apo diagnose` compares them with the answers before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType

from apo.monitoring.guard import MEASUREMENTS
from apo.monitoring.token_diagnostics import spread_pairs, trained_pairs
from apo.run_dir.files import SAMPLES, append_log

if TYPE_CHECKING:
    from apo.monitoring.token_diagnostics import ExaminedTrainer

PROMPTS = 5
MAX_TOKENS = 128
MIN_TOKENS = 16
"""Maximal and minimal tokens of an answer. If fewer than the minimum fit into `MAX_SHARE`, no prompt is answered."""
MAX_SHARE = 0.03
"""The share of a run's time that the answers may cost."""
TOKENS_PER_STEP = {"cpu": 16, "accelerator": 300}
"""Tokens that are trained in the time of one decoding step. It was 13 on a CPU with a model of 135M weights. It is an
estimate for an accelerator, whose arithmetic idles while a decoding step reads all weights."""


class SampleAnswers:
    """The answers of the model in training to a few prompts (token ids), in the file samples.jsonl of a run."""

    def __init__(
        self, trainer: ExaminedTrainer, prompts: Sequence[list[int]], tokenizer: Any, max_tokens: int, out: Path
    ) -> None:
        self.max_tokens, self._trainer, self._tokenizer, self._out = max_tokens, trainer, tokenizer, out
        self._texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        self._pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        length = max(map(len, prompts))
        self._ids = torch.tensor([[self._pad] * (length - len(prompt)) + prompt for prompt in prompts])
        self._mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def write(self, step: int) -> None:
        """Answer all prompts with the current model, and append one line for each. Only rank 0 calls it."""
        append_log(
            self._out / SAMPLES,
            [
                {"step": step, "prompt": number, "text": text, **answer}
                for number, (text, answer) in enumerate(zip(self._texts, self._answers(), strict=True))
            ],
        )

    def _answers(self) -> list[dict[str, Any]]:
        from transformers import GenerationConfig

        model, device = self._trainer.accelerator.unwrap_model(self._trainer.model), self._trainer.accelerator.device
        eos_ids = model.generation_config.eos_token_id
        eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or [self._tokenizer.eos_token_id])
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_tokens,
            eos_token_id=eos_ids,
            pad_token_id=self._pad,
            use_cache=True,
        )
        with self._trainer.evaluation_mode():
            output = model.generate(
                input_ids=self._ids.to(device), attention_mask=self._mask.to(device), generation_config=config
            )
        answers = []
        for row in output[:, self._ids.shape[1] :].tolist():
            count = next((index + 1 for index, token in enumerate(row) if token in eos_ids), None)
            text = self._tokenizer.decode(row[:count], skip_special_tokens=True)
            answers.append({"answer": text, "tokens": count or len(row), "ended": count is not None})
        return answers


def build_sample_answers(
    trainer: ExaminedTrainer, tokenizer: Any, count: int | None, out: Path
) -> SampleAnswers | None:
    """Return the sample answers of `count` prompts of held-out pairs, or of trained pairs if none are held out.

    If `count` is None, five prompts are answered, with as many tokens as `MAX_SHARE` of the run's time allows. Returns
    None if these are fewer than `MIN_TOKENS`, or if each process has only a shard of the model.
    """
    sharded = trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    pairs = [] if count == 0 or sharded else spread_pairs(trainer, 4 * (count or PROMPTS))
    prompts = [list(ids) for ids in dict.fromkeys(tuple(pair["prompt_ids"]) for pair in pairs)]
    context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    prompts = [ids for ids in prompts if len(ids) + MIN_TOKENS <= context][: count or PROMPTS]
    max_tokens = MAX_TOKENS if count else min(MAX_TOKENS, affordable_tokens(trainer))
    max_tokens = int(min(max_tokens, context - max(map(len, prompts), default=0)))
    return SampleAnswers(trainer, prompts, tokenizer, max_tokens, out) if prompts and max_tokens >= MIN_TOKENS else None


def affordable_tokens(trainer: ExaminedTrainer) -> int:
    """Return the tokens per answer with which all inspections together cost at most `MAX_SHARE` of the run."""
    sample = trainer.train_dataset[: min(len(trainer.train_dataset), 256)]
    length = sum(len(ids) for name in ("prompt_ids", "chosen_ids", "rejected_ids") for ids in sample[name])
    tokens = trained_pairs(trainer) * length / len(sample["prompt_ids"]) / trainer.args.world_size
    tokens_per_step = TOKENS_PER_STEP["cpu" if trainer.accelerator.device.type == "cpu" else "accelerator"]
    return int(MAX_SHARE * tokens / tokens_per_step / (MEASUREMENTS + 1))
