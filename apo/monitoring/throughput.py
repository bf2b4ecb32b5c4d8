"""Throughput: the metrics of each pair, held on the device until a logging step, and speed and FLOPs of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from apo.cost.sizes import GPUS, MFU
from apo.monitoring.metrics import COLUMNS
from clair.inference.generation.onednn import speeds

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


class Meter:
    """Collects the metrics of each pair since the last log, for training and for evaluation, and measures the speed."""

    def __init__(self, accelerator: Accelerator, scale: ComputeScale | str) -> None:
        self.accelerator = accelerator
        self.scale = scale
        self._rows: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._aux_losses: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._since: float | None = None
        self._paused = 0.0

    def start(self) -> None:
        """Start the clock. Later calls change nothing. Earlier pauses, as of a first evaluation, do not count."""
        if self._since is None:
            self._since, self._paused = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time within the context from the training speed."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, mode: str, rows: Tensor, aux_loss: Tensor | None = None) -> None:
        """Store the metrics of a micro-batch, [B, C], and a mixture of experts' loss, without a transfer."""
        self._rows[mode].append(rows)
        self._aux_losses[mode] += [] if aux_loss is None else [aux_loss.detach()]

    def has(self, mode: str) -> bool:
        """True if there are pairs since the last log."""
        return bool(self._rows[mode])

    def gather(self, mode: str) -> Tensor:
        """Remove and return the rows of all processes since the last log, [N, C] on the host.

        Every process must call it, and receives all rows. It needs two gathers: of the counts and of the rows.
        """
        rows, self._rows[mode] = torch.cat(self._rows[mode]), []
        if self.accelerator.num_processes > 1:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            rows = self.accelerator.gather(self.accelerator.pad_across_processes(rows))
            rows = rows[rows[:, -1] == 1, :-1]
        return rows.cpu()

    def mean_aux_loss(self, mode: str) -> dict[str, float]:
        """The mean `aux_loss` over the batches since the last call, averaged over processes; empty without one."""
        if not self._aux_losses[mode]:
            return {}
        mean, self._aux_losses[mode] = torch.stack(self._aux_losses[mode]).float().mean(), []
        means: Any = self.accelerator.gather(mean)
        return {"aux_loss": means.mean().item()}

    def speed(self, rows: Tensor) -> dict[str, float]:
        """Return pairs, tokens (of both sequences with prompts) per second since the last call, and the MFU."""
        now = time.perf_counter()
        start = now if self._since is None else self._since
        seconds = max(now - start - self._paused, 1e-9)
        self._since, self._paused = now, 0.0
        total = dict(zip(COLUMNS, rows.double().sum(0).tolist(), strict=True))
        rates = {"pairs_per_second": len(rows) / seconds, "tokens_per_second": total["tokens"] / seconds}
        if isinstance(self.scale, ComputeScale):
            flops = self.scale.flops(total["useful"], total["labels"], total["products"])
            rates["mfu"] = flops / seconds / (self.scale.peak * self.accelerator.num_processes)
        return rates


@dataclass(frozen=True)
class ComputeScale:
    """The sizes that determine a model's FLOPs, and the peak speed of its device.

    frozen, trained   weights of the linear layers without the LM head
    attention         summed width of all attention layers
    head              weights of the LM head
    peak              FLOPs per second of one device
    """

    frozen: int
    trained: int
    attention: int
    head: int
    head_is_trained: bool
    peak: float

    def flops(self, tokens: float, labels: float, products: float) -> float:
        """Return the model FLOPs of forward and backward, without padding, recomputation, or a reference model.

        Forward: 2 per weight and token, and 4 x width x query-key products of attention. Backward: twice that, and half
        of it for a frozen weight.
        """
        matrices = 2 * (2 * self.frozen + 3 * self.trained) * tokens
        return matrices + 12 * self.attention * products + 2 * (2 + self.head_is_trained) * self.head * labels


def compute_scale(model: Any, device: torch.device) -> ComputeScale | str:
    """Return the scale of a transformers or PEFT model, or the reason why its utilisation cannot be computed."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    required = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in required if not isinstance(getattr(config, key, None), int)]:
        return f"its config gives no single {missing[0]}"
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "it is a mixture of experts"
    weights = {False: 0, True: 0}
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            # Counted by shape, because the weights of a quantised or sharded layer are packed.
            weights[module.weight.requires_grad] += module.in_features * module.out_features
    peak = peak_flops(device)
    if peak is None:
        return "the peak speed of this device is unknown"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ComputeScale(
        frozen=weights[False],
        trained=weights[True],
        attention=config.num_hidden_layers * config.num_attention_heads * width,
        head=config.hidden_size * config.vocab_size,
        head_is_trained=head.weight.requires_grad,
        peak=peak,
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOPs per second of a device.

    For a GPU, its maker's dense bf16 figure, None if `apo.cost.sizes` lists none. For a CPU, the measured speed of a
    float32 matrix product of 1024, by the faster of its libraries.
    """
    if device.type == "cpu":
        return max(speeds())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.flops / MFU for gpu in GPUS if gpu.name.split(" ")[-2] in name), None)
