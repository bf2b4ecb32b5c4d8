"""Score answers by a local reward model: any sequence classifier of transformers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, check_name, one_line
from clair.core.files import read_json
from clair.data.records import Answer, Dropped, Prompt, message_text, task_text
from clair.inference.config import RewardConfig
from clair.inference.model_folder import REMEDY


class RewardModel:
    """A reward model that scores answers one at a time, without padding: a score does not depend on other answers."""

    def __init__(self, config: RewardConfig) -> None:
        self._label = check_reward(config)
        self._path = config.path
        self._thread = ThreadPoolExecutor(1, "reward-model")
        self._loaded: Any = None

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[list[float]]:
        """Return one list with the scores. Drops the row if an answer is too long or a score is not finite."""
        return [await asyncio.get_running_loop().run_in_executor(self._thread, self._score, prompt, answers)]

    async def close(self) -> None:
        """Free the weights."""
        self._thread.shutdown(cancel_futures=True)
        self._loaded = None

    # ---- in the model's thread

    def _load(self) -> Any:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
            from transformers.utils import logging

            logging.disable_progress_bar()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            try:
                model = AutoModelForSequenceClassification.from_pretrained(
                    self._path, dtype="auto" if device == "cuda" else torch.float32, use_safetensors=True
                )
                self._loaded = model.to(device).eval(), AutoTokenizer.from_pretrained(self._path)
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise UserError(f"scores.reward {self._path} cannot be loaded: {one_line(error)}") from error
        return self._loaded

    def _score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
        import torch

        model, tokenizer = self._load()
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf
        scores = []
        for answer in answers:
            inputs = _encode(tokenizer, prompt, answer)
            if (length := inputs["input_ids"].shape[1]) > longest:
                raise Dropped(
                    "reward", "too_long", f"prompt and answer have {length} tokens; the model reads {longest}"
                )
            with torch.no_grad():
                logits = model(**inputs.to(model.device)).logits[0].float()
            score = float(logits[0] if self._label is None else logits.softmax(-1)[self._label])
            if not math.isfinite(score):
                raise Dropped("reward", "nan", "the score is no finite number")
            scores.append(score)
        return scores


def _encode(tokenizer: Any, prompt: Prompt, answer: Answer) -> Any:
    """Encode the conversation by the chat template or, without one, prompt and answer as two segments."""
    if not tokenizer.chat_template:
        return tokenizer(task_text(prompt.messages, prompt.tools), message_text(answer.message()), return_tensors="pt")
    turns = [*prompt.messages, answer.message()]
    tools = list(prompt.tools) or None
    return tokenizer.apply_chat_template(turns, tools=tools, return_tensors="pt", return_dict=True)


def check_reward(config: RewardConfig) -> int | None:
    """Check a reward model's folder. Return the index of `label`, or None for a single output. Raises UserError."""
    folder = Path(config.path)
    if (folder / "reward.json").is_file():
        raise UserError(
            f"scores.reward {folder} is a reward of `apo reward fit`; use it as a checker: "
            f"scores.checker.command: [apo, reward, serve, {folder}]"
        )
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(f"scores.reward {folder} holds no config.json with *.safetensors; save it with save_pretrained")
    facts = read_json(folder / "config.json", REMEDY)
    architecture = next(iter(facts.get("architectures") or ()), "a model without a name")
    if not architecture.endswith("ForSequenceClassification"):
        raise UserError(
            f"scores.reward {folder} is {architecture}, which gives no scores; give a folder of a "
            f"...ForSequenceClassification"
        )
    labels = facts.get("id2label") or {str(n): f"LABEL_{n}" for n in range(facts.get("num_labels", 2))}
    return _label_index(folder, config.label, labels)


def _label_index(folder: Path, label: str | None, labels: Mapping[str, str]) -> int | None:
    names = list(labels.values())
    if label is None and len(names) == 1:
        return None
    if label is None:
        raise UserError(
            f"scores.reward {folder} has {len(names)} classes; name the one whose probability is the score: "
            f"scores.reward.label, one of {', '.join(names)}"
        )
    check_name("scores.reward.label: unknown class", label, names)
    return next(int(index) for index, name in labels.items() if name == label)
