"""Matrix products of float32 on a CPU, by the faster of the two libraries that torch carries.

torch multiplies float32 matrices with MKL, which leaves the widest instructions of processors that are not Intel's
unused; oneDNN, in the same torch, uses them. Inputs, type and precision are the same, only the order of adding up is
another. oneDNN makes code for each number of rows it meets and keeps it, so packed rows are filled up to a multiple of
`ROWS`, and it is asked for such multiples alone.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

ROWS = 32
"""Numbers of rows that oneDNN is asked for are multiples of this."""
REPEATS = 12
"""How often a speed is measured."""
_FASTER = 1.2
"""How many times as fast as torch's own it must be."""


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@functools.cache
def speeds() -> tuple[float, float]:
    """FLOPs a second of torch's own product of 1024 x 1024 in float32 and of oneDNN's (0 without it).

    Measured `REPEATS` times, the best of which counts, and by the processor time of a thread where that is less: what
    other processes take meanwhile says nothing of a run that lasts.
    """
    one = torch.ones(1024, 1024)
    ways: tuple[Callable[[], Any], ...] = (lambda: one @ one.T, lambda: _onednn(one, one))
    best = [float("inf"), float("inf")]
    for _ in range(REPEATS):
        for place, way in enumerate(ways):
            started, worked = time.perf_counter(), time.process_time()
            try:
                way()
            except (AttributeError, RuntimeError):  # a torch without it, or a processor that it has no code for
                continue
            of_a_thread = (time.process_time() - worked) / torch.get_num_threads()
            best[place] = min(best[place], time.perf_counter() - started, of_a_thread)
    own, other = (2 * 1024**3 / seconds for seconds in best)
    return own, other


def rows_multiple(device: torch.device) -> int:
    """What the number of rows should be a multiple of on this device: `ROWS` where oneDNN is taken, else 1."""
    own, other = speeds() if device.type == "cpu" else (1.0, 0.0)
    return ROWS if other >= _FASTER * own else 1


def _quick(rows: int, *factors: torch.Tensor) -> bool:
    plain = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in factors)
    if torch.compiler.is_compiling():  # `torch_compile`: it cannot read oneDNN's products, and makes its own
        return False
    return plain and rows % ROWS == 0 and rows_multiple(factors[0].device) == ROWS


def product(a: torch.Tensor, b: torch.Tensor, rows: int) -> torch.Tensor:
    """a @ b.T of [n, k] and [m, k]; `rows` is how many hidden states take part, whichever dimension they are."""
    return _onednn(a, b) if _quick(rows, a, b) else a @ b.T


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, with both products of backward by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(x, weight)
        out = _onednn(x, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = _onednn(flat, weight.T).view_as(x) if needs_x else None
        grad_weight = _onednn(x.reshape(-1, x.shape[-1]).T, flat.T).T if needs_weight else None
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None


def _linear(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    if not _quick(rows, x, self.weight) or torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, self.weight, self.bias)
    return _Linear.apply(x, self.weight, self.bias)


def use_onednn(model: torch.nn.Module) -> None:
    """Let the plain linear layers of a model multiply by the faster library, where that is not torch's own."""
    for module in model.modules():
        if type(module).forward is torch.nn.Linear.forward and "forward" not in vars(module):
            module.forward = types.MethodType(_linear, module)


def restore_linear(model: torch.nn.Module) -> None:
    """Undo `use_onednn`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _linear:
            del module.forward
