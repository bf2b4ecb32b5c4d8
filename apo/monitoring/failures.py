"""Failures that stop a run: a loss that is not finite, memory that runs out, a file that cannot be written.

Each error is one line that says what to change.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError

from apo.data.tokenize import ID_COLUMNS
from apo.distributed.deepspeed import local_shard
from apo.monitoring.metrics import token_counts
from apo.packing.async_copy import HostCopy
from apo.packing.batch import PairBatch
from apo.packing.layout import packed_length
from apo.run_dir import checkpoints
from clair.core.errors import EXIT_STOPPED, UserError, list_some
from clair.core.exit_codes import SYSTEM_ERRNOS

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import TrainerState

    from apo.losses.mixture import Mixture

MAX_NAMES = 8
"""Maximal number of pairs that a message names."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


class RunningTrainer(Protocol):
    """What the checks of losses, gradients, weights and files need of a trainer. `args` is an APOConfig."""

    @property
    def args(self) -> Any: ...
    @property
    def state(self) -> TrainerState: ...
    @property
    def model(self) -> Any: ...
    @property
    def train_dataset(self) -> Any: ...


class MemoryTrainer(RunningTrainer, Protocol):
    """What the message about memory also needs of a trainer."""

    @property
    def ref_model(self) -> Any: ...
    @property
    def objective(self) -> Mixture: ...

    @property
    def is_packed(self) -> bool:
        """True if pairs run in packed rows, without padding and with each prompt once."""
        ...

    @property
    def current_batch(self) -> PairBatch | None:
        """The batch in the current forward pass."""
        ...


class TrainingStopped(UserError):
    """Training stopped itself. The message has the reason, and what to change."""

    exit_code = EXIT_STOPPED


class NonFiniteLossCheck:
    """Stops training at a loss that is not finite, names the pairs, and prevents saving such a step.

    On a CPU, each micro-batch is checked at once. On other devices losses arrive late: `add` checks the micro-batch two
    before the current one, and `flush` checks all before anything is logged or saved.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = 0 if device.type == "cpu" else 2
        self._pending: deque[tuple[int, HostCopy, list[dict[str, Any]]]] = deque()

    def add(self, trainer: RunningTrainer, losses: Tensor, examples: list[dict[str, Any]]) -> None:
        """Add the losses [B] of a micro-batch. Raises TrainingStopped if a loss that has arrived is not finite."""
        self._pending.append((trainer.state.global_step + 1, HostCopy(~losses.detach().isfinite()), examples))
        self._check(trainer, self._lag)

    def flush(self, trainer: RunningTrainer) -> None:
        """Check all losses. Raises TrainingStopped if one is not finite."""
        self._check(trainer, 0)

    def _check(self, trainer: RunningTrainer, lag: int) -> None:
        while len(self._pending) > lag:
            step, mask, examples = self._pending.popleft()
            if (lost := mask.value()).any():
                raise TrainingStopped(_loss_message(trainer, step, lost.tolist(), examples))


def _loss_message(trainer: RunningTrainer, step: int, lost: Sequence[bool], examples: Sequence[dict[str, Any]]) -> str:
    names = pair_names(examples, trainer.train_dataset)
    lost_names = [name for name, is_lost in zip(names, lost, strict=True) if is_lost]
    if len(lost_names) == len(names):
        which = f"all {len(names)} pairs of its batch ({list_some(names, MAX_NAMES)})"
        change = "training has diverged: lower trainer.learning_rate, or warm it up (trainer.warmup_steps)"
    else:
        others = [name for name in names if name not in lost_names]
        which = (
            f"{len(lost_names)} of {len(names)} pairs of its batch ({list_some(lost_names, MAX_NAMES)}; the others: "
            f"{list_some(others, MAX_NAMES)})"
        )
        change = "look at these pairs and take them out, or lower trainer.learning_rate"
    if trainer.args.fp16:
        change += ", or train in bfloat16 (trainer.bf16), whose numbers do not overflow"
    return f"step {step}: the loss is not finite for {which}; {change}; {checkpoint_hint(trainer)}"


def check_gradient(trainer: RunningTrainer, norm: float | None) -> None:
    """Raise Stopped if the gradient is not finite, although the loss is. In float16 the scaler skips such steps."""
    if norm is not None and not abs(norm) < float("inf") and not trainer.args.fp16:
        raise TrainingStopped(
            f"step {trainer.state.global_step}: the gradient is not finite, although the loss is; lower "
            f"trainer.learning_rate, or train in float32; {checkpoint_hint(trainer)}"
        )


def check_weights_finite(trainer: RunningTrainer) -> None:
    """Raise Stopped if a trained weight is not finite, so that no checkpoint or model with it is written."""
    shards = [local_shard(weight) for weight in trainer.model.parameters() if weight.requires_grad]
    if not torch.stack([shard.isfinite().all() for shard in shards]).all():
        raise TrainingStopped(
            f"step {trainer.state.global_step}: trained weights are not finite, so nothing is saved; lower "
            f"trainer.learning_rate; {checkpoint_hint(trainer)}"
        )


def pair_names(examples: Sequence[dict[str, Any]], dataset: Dataset) -> list[str]:
    """Return the names of tokenised pairs: their `id` in the dataset, or else their row, such as `row 7`.

    Pairs are matched by their token ids; the dataset is read until all have a match.
    """

    def key_of(row: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(row[name]) for name in ID_COLUMNS)

    names = dict.fromkeys((key_of(example) for example in examples), "unknown")
    missing = set(names)
    has_ids = "id" in dataset.column_names
    rows: Any = dataset.select_columns([*ID_COLUMNS, "id"] if has_ids else list(ID_COLUMNS))
    for index, row in enumerate(rows):
        key = key_of(row)
        if key in missing:
            names[key] = str(row["id"]) if has_ids else f"row {index}"
            missing.discard(key)
        if not missing:
            break
    return [names[key_of(example)] for example in examples]


def checkpoint_hint(trainer: RunningTrainer) -> str:
    """Name the newest checkpoint from which the run can resume, or say that there is none."""
    newest_first = reversed(checkpoints.checkpoints(Path(trainer.args.output_dir)))
    resumable = next((folder for folder in newest_first if checkpoints.resume_problem(folder) is None), None)
    return f"the last good checkpoint is {resumable}" if resumable else "no checkpoint had been saved"


# ---- the disk


@contextlib.contextmanager
def stop_on_write_error(trainer: RunningTrainer, name: str) -> Iterator[None]:
    """Turn a failed write into Stopped, and remove the partly written checkpoint. Other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _write_error(error)) is None:
            raise
        shutil.rmtree(Path(trainer.args.output_dir) / checkpoints.UNFINISHED, ignore_errors=True)
        raise TrainingStopped(
            f"step {trainer.state.global_step}: {name} cannot be written to {trainer.args.output_dir} ({reason}); "
            f"make room or give permission, then run the same command again; {checkpoint_hint(trainer)}"
        ) from error


def _write_error(error: BaseException) -> str | None:
    """Return the system's message for a failed write, or None. safetensors and torch hide it in their own messages."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    if number in SYSTEM_ERRNOS:
        return os.strerror(number)
    if "inline_container" in str(error):  # torch.save found the file shorter than what it wrote
        return "torch could not write all of a file; is the disk full?"
    return None


# ---- memory


@contextlib.contextmanager
def stop_on_out_of_memory(trainer: MemoryTrainer, phase: str) -> Iterator[None]:
    """Turn an out-of-memory error into Stopped, with settings that need less memory. Other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStopped(_memory_message(trainer, phase)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that there is no memory left, on a CPU or a GPU."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(phrase in message for phrase in _NO_MEMORY)


def _memory_message(trainer: MemoryTrainer, phase: str) -> str:
    batch, step = trainer.current_batch, trainer.state.global_step
    size = ""
    if batch is not None:
        size = f" with {len(batch)} pairs of {sum(_computed_tokens(trainer, batch)):,} tokens in one pass"
    return (
        f"out of memory in {phase}{f', after step {step}' if step else ''}{size}: set "
        f"{'; or '.join(memory_suggestions(trainer, batch))}; {checkpoint_hint(trainer)}"
    )


def _computed_tokens(trainer: MemoryTrainer, batch: PairBatch) -> list[int]:
    if trainer.is_packed:
        return [packed_length(example) for example in batch.examples]
    return token_counts(batch.stacked)[:, 1].tolist()


def memory_suggestions(trainer: MemoryTrainer, batch: PairBatch | None) -> list[str]:
    """Return settings that need less memory, the cheapest first, each with its cost."""
    args = trainer.args
    pairs = args.per_device_train_batch_size
    changes = []
    if trainer.is_packed:
        max_tokens = args.pack_tokens if batch is None else sum(_computed_tokens(trainer, batch))
        if max_tokens and (batch is None or len(batch) > 1):
            changes.append(f"trainer.pack_tokens: {max(max_tokens // 2, 1)} (more passes, the same result)")
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
    limit = f" below {args.max_length}" if args.max_length else ""
    return [*changes, f"trainer.max_length{limit} (leaves the longest pairs out)"]
