"""The meter of a run: what its pairs were and how fast they went, kept on the device and read at logging steps only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from apo.cost import sizes as shapes
from apo.monitoring.metrics import COLUMNS
from apo.packing.onednn import speeds

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn


class Meter:
    """Metrics per pair since the last log, for training and for evaluation, and a clock."""

    def __init__(self, accelerator: Accelerator, scale: Scale | str) -> None:
        self.accelerator = accelerator
        self.scale = scale
        self._rows: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._since: float | None = None
        self._paused = 0.0

    def start(self) -> None:
        """Start the clock, the first time it is called."""
        if self._since is None:
            self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock for what is no training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, mode: str, rows: Tensor) -> None:
        """Keep the pairs of a micro-batch. No transfer, and nothing said to other processes."""
        self._rows[mode].append(rows)

    def has(self, mode: str) -> bool:
        """Whether there are pairs since the last log."""
        return bool(self._rows[mode])

    def take(self, mode: str) -> Tensor:
        """The pairs of all processes since the last log, [N, C] on the host: two gathers, how many and what.

        Every process has to ask, and gets all of them.
        """
        rows, self._rows[mode] = torch.cat(self._rows[mode]), []
        if self.accelerator.num_processes > 1:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            rows = self.accelerator.gather(self.accelerator.pad_across_processes(rows))
            rows = rows[rows[:, -1] == 1, :-1]
        return rows.cpu()

    def speed(self, rows: Tensor) -> dict[str, float]:
        """Pairs and tokens (of both sequences, prompts included) a second since the last call, and the utilisation."""
        now = time.perf_counter()
        since = now if self._since is None else self._since
        seconds = max(now - since - self._paused, 1e-9)
        self._since, self._paused = now, 0.0
        total = dict(zip(COLUMNS, rows.double().sum(0).tolist(), strict=True))
        rates = {"pairs_per_second": len(rows) / seconds, "tokens_per_second": total["tokens"] / seconds}
        if isinstance(self.scale, Scale):
            done = self.scale.flops(total["useful"], total["labels"], total["products"])
            rates["mfu"] = done / seconds / (self.scale.peak * self.accelerator.num_processes)
        return rates


@dataclass(frozen=True)
class Scale:
    """What a model's arithmetic is measured by: weights of its linear layers, frozen and trained, without the LM head;
    width of all attention layers together; weights of the LM head; and the `peak` of one device, FLOPs a second.
    """

    frozen: int
    trained: int
    attention: int
    head: int
    head_is_trained: bool
    peak: float

    def flops(self, tokens: float, labels: float, products: float) -> float:
        """Model FLOPs of forward and backward: what training has to compute, nothing computed anew, no padding.

        2 a weight and token, twice that again for backward, of which a frozen weight needs half; attention 4 x width x
        query-key products, and twice again. A reference computed on the way is not in it.
        """
        matrices = 2 * (2 * self.frozen + 3 * self.trained) * tokens
        return matrices + 12 * self.attention * products + 2 * (2 + self.head_is_trained) * self.head * labels


def scale_of(model: nn.Module, device: torch.device) -> Scale | str:
    """The scale of a model, with an adapter or without, or why its utilisation cannot be told."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    wanted = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in wanted if not isinstance(getattr(config, key, None), int)]:
        return f"its config gives no single {missing[0]}"
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "it is a mixture of experts"
    weights = {False: 0, True: 0}
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            # By its shape: the weights of a quantised or sharded layer are packed.
            weights[module.weight.requires_grad] += module.in_features * module.out_features
    peak = peak_of(device)
    if peak is None:
        return "the peak of this device is not known"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Scale(
        weights[False], weights[True], config.num_hidden_layers * config.num_attention_heads * width,
        config.hidden_size * config.vocab_size, head.weight.requires_grad, peak,
    )  # fmt: skip


def peak_of(device: torch.device) -> float | None:
    """FLOPs a second at most: a GPU's dense bf16 figure as its maker gives it (None where shapes.py has none); on a CPU
    the speed of a float32 matrix product of 1024, by the faster of its libraries.
    """
    if device.type == "cpu":
        return max(speeds())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.flops / shapes.MFU for gpu in shapes.GPUS if gpu.name.split(" ")[-2] in name), None)
