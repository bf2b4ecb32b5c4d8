"""What ends a run before its time: a loss that is no number, memory that is used up, a full disk. One line says what
to change.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from apo.data.tokenize import ID_COLUMNS
from apo.distributed.deepspeed import local_shard
from apo.monitoring.metrics import token_counts
from apo.packing.async_copy import HostCopy
from apo.packing.logps import Batch, uncollate
from apo.run_dir import checkpoints
from clair.core.errors import EXIT_STOPPED, UserError
from clair.core.exit_codes import OF_THE_SYSTEM

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from apo.training.trainer import APOTrainer

NAMED = 8
"""Pairs that a message names."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


class Stopped(UserError):
    """Training ended before its time, and not because anybody asked: what was found, and what to change."""

    exit_code = EXIT_STOPPED


class NonFiniteLossCheck:
    """Stops training at a loss that is not finite, naming the pairs, before such a step is saved.

    On a CPU it looks at every micro-batch at once. Elsewhere losses take their time to arrive, so it looks at the one
    before the last; before anything is logged or saved it looks at all.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = 0 if device.type == "cpu" else 2
        self._seen: deque[tuple[int, HostCopy, Batch]] = deque()

    def look(self, trainer: APOTrainer, losses: Tensor, batch: Batch) -> None:
        """Take note of a micro-batch, [B] losses. Raises Stopped where one that can be looked at is not finite."""
        self._seen.append((trainer.state.global_step + 1, HostCopy(~losses.detach().isfinite()), batch))
        self.settle(trainer, self._lag)

    def settle(self, trainer: APOTrainer, left: int = 0) -> None:
        """Look at all micro-batches but the `left` last."""
        while len(self._seen) > left:
            step, fetched, batch = self._seen.popleft()
            if (lost := fetched.value()).any():
                raise Stopped(_loss_words(trainer, step, lost.tolist(), batch))


def _loss_words(trainer: APOTrainer, step: int, lost: Sequence[bool], batch: Batch) -> str:
    names = names_of(uncollate(batch), trainer.train_dataset)
    of_lost = [name for name, is_lost in zip(names, lost, strict=True) if is_lost]
    if len(of_lost) == len(names):
        which = f"all {len(names)} pairs of its batch ({_some(names)})"
        change = "the model has lost its numbers: lower trainer.learning_rate, or warm it up (trainer.warmup_steps)"
    else:
        others = _some([name for name in names if name not in of_lost])
        which = f"{len(of_lost)} of {len(names)} pairs of its batch ({_some(of_lost)}; beside them {others})"
        change = "look at these pairs and take them out, or lower trainer.learning_rate"
    if trainer.args.fp16:
        change += ", or train in bfloat16 (trainer.bf16), whose numbers do not overflow"
    return f"step {step}: the loss is not finite for {which}; {change}; {kept_words(trainer)}"


def check_gradient(trainer: APOTrainer, norm: float | None) -> None:
    """Raises Stopped where a gradient is not finite though the loss is. In float16 the scaler skips such steps."""
    if norm is not None and not abs(norm) < float("inf") and not trainer.args.fp16:
        raise Stopped(
            f"step {trainer.state.global_step}: the gradient is not finite though the loss is; lower "
            f"trainer.learning_rate, or train in float32; {kept_words(trainer)}"
        )


def check_weights_finite(trainer: APOTrainer) -> None:
    """Raises Stopped where a trained weight is not finite, so that no such checkpoint or model is ever written."""
    mine = [local_shard(weight) for weight in trainer.model.parameters() if weight.requires_grad]
    if not torch.stack([weight.isfinite().all() for weight in mine]).all():
        raise Stopped(
            f"step {trainer.state.global_step}: trained weights are not finite, so nothing is saved; lower "
            f"trainer.learning_rate; {kept_words(trainer)}"
        )


def names_of(examples: Sequence[dict[str, list[int]]], dataset: Dataset) -> list[str]:
    """What the dataset calls these pairs: their `id`, else `row 7`; found by their token ids, so this takes a while."""
    wanted: dict[tuple[tuple[int, ...], ...], str] = {
        tuple(tuple(example[name]) for name in ID_COLUMNS): "unknown" for example in examples
    }
    keys = list(wanted)
    missing = set(keys)
    has_ids = "id" in dataset.column_names
    for row, found in enumerate(dataset.select_columns([*ID_COLUMNS, "id"] if has_ids else list(ID_COLUMNS))):
        key = tuple(tuple(found[name]) for name in ID_COLUMNS)
        if key in missing:
            wanted[key] = str(found["id"]) if has_ids else f"row {row}"
            missing.discard(key)
        if not missing:
            break
    return [wanted[tuple(tuple(example[name]) for name in ID_COLUMNS)] for example in examples]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def kept_words(trainer: APOTrainer) -> str:
    """Which checkpoint is left to go on from."""
    saved = reversed(checkpoints.checkpoints(Path(trainer.args.output_dir)))
    whole = next((folder for folder in saved if checkpoints.resume_problem(folder) is None), None)
    return f"the last good checkpoint is {whole}" if whole else "no checkpoint had been saved"


# ---- the disk


@contextlib.contextmanager
def disk_watched(trainer: APOTrainer, doing: str) -> Iterator[None]:
    """Turns the error of a disk that is full or refuses into Stopped, without what was half written; others pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _reason_of_disk(error)) is None:
            raise
        shutil.rmtree(Path(trainer.args.output_dir) / checkpoints.UNFINISHED, ignore_errors=True)
        raise Stopped(
            f"step {trainer.state.global_step}: {doing} cannot be written to {trainer.args.output_dir} ({reason}); "
            f"make room or permissions, then run the same command again; {kept_words(trainer)}"
        ) from error


def _reason_of_disk(error: BaseException) -> str | None:
    """What the system says of a write that failed, also through safetensors and torch, which keep it in their text."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number in OF_THE_SYSTEM:
        return os.strerror(number)
    if "inline_container" in str(error):  # torch.save: the file's end is not where it wrote it
        return "torch could not write all of a file; is the disk full?"
    return None


# ---- memory


@contextlib.contextmanager
def memory_watched(trainer: APOTrainer, doing: str) -> Iterator[None]:
    """Turns an error of used-up memory into Stopped, with the settings to change; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise Stopped(_memory_words(trainer, doing)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a CPU or a GPU."""
    told = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in told for words in _NO_MEMORY)


def _memory_words(trainer: APOTrainer, doing: str) -> str:
    batch = trainer.current_batch
    where = f"{doing}, after step {trainer.state.global_step}" if trainer.state.global_step else doing
    size = ""
    if batch is not None:
        work = token_counts(batch, packed=trainer.is_packed)
        size = f" with {len(work)} pairs of {int(work[:, 1].sum()):,} tokens in one pass"
    changes = "; or ".join(memory_changes(trainer, batch))
    return f"out of memory in {where}{size}: set {changes}; {kept_words(trainer)}"


def memory_changes(trainer: APOTrainer, batch: Batch | None = None) -> list[str]:
    """What would take less memory than the settings there are, the cheapest first; each with what it costs."""
    args = trainer.args
    pairs = args.per_device_train_batch_size
    changes = []
    if trainer.is_packed:
        computed = token_counts(batch, packed=True)[:, 1] if batch is not None else None
        most = int(computed.sum()) if computed is not None else args.pack_tokens
        if most and (computed is None or len(computed) > 1):
            changes.append(f"trainer.pack_tokens: {max(most // 2, 1)} (more passes, the same result)")
    elif pairs > 1:
        accumulation = args.gradient_accumulation_steps * pairs // (pairs // 2)
        changes.append(
            f"trainer.per_device_train_batch_size: {pairs // 2} with trainer.gradient_accumulation_steps: "
            f"{accumulation} (the same result)"
        )
    if not args.activation_checkpointing:
        changes.append("trainer.gradient_checkpointing: true (a third slower, the same result)")
    if trainer.ref_model is not None and trainer.objective.needs_reference and not trainer.objective.needs_divergence:
        changes.append("reference: cached (no second model in memory)")
    if not hasattr(trainer.model, "peft_config"):
        changes.append("lora: {r: 16} (no gradients and optimizer states of the whole model)")
    if next(trainer.model.parameters()).dtype == torch.float32:
        changes.append("trainer.model_init_kwargs: {dtype: bfloat16} (half the memory, less exact)")
    longest = f" below {args.max_length}" if args.max_length else ""
    changes.append(f"trainer.max_length{longest} (leaves the longest pairs out)")
    return changes
