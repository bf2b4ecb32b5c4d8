"""Matrix products on a CPU, by the faster of the two libraries that torch includes.

torch multiplies float32 matrices with MKL, which does not use the widest instructions of processors that Intel did not
make; oneDNN, in the same torch, does. Inputs, type and precision are the same; only the order of summation differs.
oneDNN compiles code for each new number of rows and keeps it, so packed rows are filled up to a multiple of `ROWS`, and
oneDNN multiplies such multiples only; any number in inference mode, where a row is multiplied hundreds of times.
A model that only generates has its weights in oneDNN's own order (`pack_weights`). Both uses are measured apart: for a
few rows oneDNN is twice as fast on processors where large products are equal.

A processor without instructions for bfloat16 multiplies it in float32 and rounds the result: torch's own products take
5 to 25 times as long there.
"""

from __future__ import annotations

import functools
import time
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

ROWS = 32
"""oneDNN multiplies numbers of rows that are multiples of this."""
_TYPICAL_ROWS = 16
"""The order of packed weights is chosen for this number of rows; any number can be multiplied."""
REPEATS = 12
"""How often a speed is measured."""
_MIN_SPEEDUP = 1.2
"""oneDNN is used if it is at least this many times as fast as torch's default."""


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)


@functools.cache
def speeds() -> tuple[float, float]:
    """FLOPs per second of torch's default product of 1024 x 1024 in float32 and of oneDNN's (0 without it)."""
    ones = torch.ones(1024, 1024)
    default, onednn = (
        2 * 1024**3 / seconds for seconds in _best_times(lambda: ones @ ones.T, lambda: _onednn(ones, ones))
    )
    return default, onednn


@functools.cache
def is_faster_for_generation() -> bool:
    """True if oneDNN multiplies a few rows faster than torch's default, the weight in its own order.

    That is so also where `speeds` are equal: the default reads and orders the whole weight for each product.
    """
    weight, rows = torch.ones(1024, 1024), torch.ones(_TYPICAL_ROWS, 1024)
    packed = functools.cache(lambda: _reordered(weight))  # by the first of the measurements
    with torch.inference_mode():
        default, onednn = _best_times(lambda: rows @ weight.T, lambda: _onednn(rows, packed()))
    return onednn * _MIN_SPEEDUP <= default


def _best_times(*products: Callable[[], Any]) -> list[float]:
    """Seconds of each product, infinite if it cannot be made: the best of `REPEATS` measurements.

    The processor time per thread counts if that is less than the elapsed time: the load of other processes at this
    moment says nothing about a run of hours.
    """
    best = [float("inf")] * len(products)
    for _ in range(REPEATS):
        for index, multiply in enumerate(products):
            start, cpu_start = time.perf_counter(), time.process_time()
            try:
                multiply()
            except (AttributeError, RuntimeError):  # a torch without oneDNN, or a processor it has no code for
                continue
            per_thread = (time.process_time() - cpu_start) / torch.get_num_threads()
            best[index] = min(best[index], time.perf_counter() - start, per_thread)
    return best


def rows_multiple(device: torch.device) -> int:
    """The multiple that the number of rows is filled up to on this device: `ROWS` if oneDNN is used, else 1."""
    default, onednn = speeds() if device.type == "cpu" else (1.0, 0.0)
    return ROWS if onednn >= _MIN_SPEEDUP * default else 1


def _uses_onednn(rows: int, *factors: torch.Tensor) -> bool:
    plain = all(factor.device.type == "cpu" and factor.dtype == torch.float32 for factor in factors)
    if torch.compiler.is_compiling():  # `torch_compile` cannot trace oneDNN's products, and generates its own
        return False
    if plain and torch.is_inference_mode_enabled():
        return is_faster_for_generation()
    return plain and rows % ROWS == 0 and rows_multiple(factors[0].device) == ROWS


@functools.cache
def has_bfloat16() -> bool:
    """True if this processor has fast products of bfloat16; also if torch cannot tell."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return True


def _multiplies_in_float32(rows: int, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    return rows >= ROWS and not has_bfloat16()


def product(a: torch.Tensor, b: torch.Tensor, rows: int) -> torch.Tensor:
    """a @ b.T of [n, k] and [m, k]; `rows` is the number of hidden states, in whichever dimension."""
    if _uses_onednn(rows, a, b):
        return _onednn(a, b)
    if _multiplies_in_float32(rows, a.device, a.dtype):
        with torch.autocast("cpu", enabled=False):
            return (a.float() @ b.float().T).to(a.dtype)
    return a @ b.T


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, with its products and those of the backward pass by `product`.

    `node` is the node that made x, if it can `recompute` x from what it saves itself: x is then not saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, node: Any) -> Any:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.node = node if needs_weight else None
        ctx.save_for_backward(x if needs_weight and node is None else None, weight if needs_x else None)
        out = product(x, weight, x.numel() // x.shape[-1])
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        x = x if ctx.node is None else ctx.node.recompute(ctx.node)
        (grad,) = grad_outputs
        flat = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = product(flat, weight.T, len(flat)).view(*grad.shape[:-1], -1) if needs_x else None
        grad_weight = product(flat.T, x.reshape(-1, x.shape[-1]).T, len(flat)) if needs_weight else None
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None, None


def _linear(self: torch.nn.Linear, x: torch.Tensor) -> Any:
    rows, weight, bias = x.numel() // max(x.shape[-1], 1), self.weight, self.bias
    if x.device.type != "cpu":
        return functional.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if x.dtype == torch.float64 or not _multiplies_in_float32(rows, x.device, dtype):
            return functional.linear(x, weight, bias)
        return _Linear.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), None)
    in_float32 = x.dtype == weight.dtype and _multiplies_in_float32(rows, x.device, x.dtype)
    node = x.grad_fn if hasattr(x.grad_fn, "recompute") else None
    if node is not None or in_float32 or _uses_onednn(rows, x, weight):
        return _Linear.apply(x, weight, bias, node)
    return functional.linear(x, weight, bias)


def use_onednn(model: torch.nn.Module) -> None:
    """Let the plain linear layers of a model multiply in the fastest way on this processor."""
    for module in model.modules():
        if type(module).forward is torch.nn.Linear.forward and "forward" not in vars(module):
            module.forward = types.MethodType(_linear, module)


def restore_linear(model: torch.nn.Module) -> None:
    """Undo `use_onednn`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _linear:
            del module.forward


class PackedLinear(torch.nn.Module):
    """A linear layer for generation only, its weight `[out, in]` in the order in which oneDNN reads it.

    Otherwise each product of a few rows reorders the whole weight first. The result of a row does not depend on the
    number of rows.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        # An opaque tensor, neither parameter nor buffer: moving or saving the module is not supported.
        self._packed = _reordered(linear.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in the usual order, a copy: for code of a model that reads it."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T + bias, without a gradient."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def pack_weights(model: torch.nn.Module) -> None:
    """Let a model that only generates multiply with packed weights where oneDNN is faster (on a CPU, in float32).

    Each plain linear layer is replaced and its weight freed; a layer whose weight another module holds too, such as a
    tied embedding, is left as `use_onednn` leaves it.
    """
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for parent in [module for module in model.modules() if type(module) is not torch.nn.Linear]:
        for name, module in list(parent.named_children()):
            if type(module) is torch.nn.Linear and holders[id(module.weight)] == 1:
                with torch.inference_mode():
                    if _uses_onednn(ROWS, module.weight):
                        setattr(parent, name, PackedLinear(module))
    for tensor in [*model.parameters(), *model.buffers()]:  # one view of a mapped file keeps all of it in memory
        tensor.data = tensor.data.clone()
    use_onednn(model)
