"""Norms and gated MLPs of a decoder layer with backward passes by hand: on a CPU their time is that of memory.

A norm keeps its input and one number per token, a gated MLP its two projections; torch would keep what lies between,
too. The linear layers that follow (clair.inference.generation.onednn) keep no input: it is computed again in their
backward pass. `use_fused` recognizes modules by what they compute, whatever the architecture, and leaves others as they
are.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.func import functional_call

_OFFSET = "_offset_of_fused_norm"
"""Attribute of a norm: what is added to its weight."""
_CHUNK = 2**18
"""Numbers of a tensor that are computed at a time, so that they stay in a processor's cache."""


def _chunks(rows: torch.Tensor) -> list[slice]:
    size = max(1, _CHUNK // rows.shape[-1])
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _saved(ctx: Any) -> Any:
    """Return a node's saved tensors, which activation checkpointing lets a node read once only."""
    if not hasattr(ctx, "saved"):
        ctx.saved = ctx.saved_tensors
    return ctx.saved


def _last_saved(ctx: Any) -> Any:
    """Return a node's saved tensors in its own backward pass, the last that needs them and what `recompute` stored."""
    saved = _saved(ctx)
    del ctx.saved
    vars(ctx).pop("output", None)
    return saved


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        inverse = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.recompute = _RMSNorm.recompute
        return _normed(x, weight, inverse)

    @staticmethod
    def recompute(ctx: Any) -> torch.Tensor:
        """Return the output again, once for all layers that follow."""
        if not hasattr(ctx, "output"):
            ctx.output = _normed(*_saved(ctx))
        return ctx.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator
        x, weight, inverse = _last_saved(ctx)
        flat, grad = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, grad_outputs[0]))
        grad_x, grad_weight = torch.empty_like(flat), torch.zeros_like(weight)
        for chunk in _chunks(flat):
            rows, scale, out = flat[chunk], inverse[chunk], grad_x[chunk]
            products = torch.mul(grad[chunk], rows, out=out)
            grad_weight += scale[:, 0] @ products
            slope = (products @ weight)[:, None] * scale**3 / -x.shape[-1]
            torch.mul(grad[chunk], scale, out=out).mul_(weight).addcmul_(rows, slope)
        return grad_x.view_as(x), grad_weight, None


def _normed(x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    flat, out = x.reshape(-1, x.shape[-1]), torch.empty_like(x, memory_format=torch.contiguous_format)
    for chunk in _chunks(flat):
        torch.mul(flat[chunk], inverse[chunk], out=out.view_as(flat)[chunk]).mul_(weight)
    return out


class _Gated(torch.autograd.Function):
    """activation(gate) * up; `tanh` selects GELU by tanh, else SiLU."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any, tanh: bool) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        ctx.recompute = _Gated.recompute
        return _gated(gate, up, tanh)

    @staticmethod
    def recompute(ctx: Any) -> torch.Tensor:
        """Return the output again, for the one layer that follows."""
        gate, up = _saved(ctx)
        return _gated(gate, up, ctx.tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator
        gate, up, grad = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (*_last_saved(ctx), grad_outputs[0]))
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        aten = torch.ops.aten
        for chunk in _chunks(gate):
            grad_act = grad[chunk] * up[chunk]
            if ctx.tanh:
                aten.gelu_backward.grad_input(grad_act, gate[chunk], approximate="tanh", grad_input=grad_gate[chunk])
            else:
                aten.silu_backward.grad_input(grad_act, gate[chunk], grad_input=grad_gate[chunk])
            _activation(gate[chunk], ctx.tanh, grad_up[chunk]).mul_(grad[chunk])
        shape = grad_outputs[0].shape
        return grad_gate.view(shape), grad_up.view(shape), None


def _activation(gate: torch.Tensor, tanh: bool, out: torch.Tensor) -> torch.Tensor:
    return (
        torch.ops.aten.gelu.out(gate, approximate="tanh", out=out) if tanh else torch.ops.aten.silu.out(gate, out=out)
    )


def _gated(gate: torch.Tensor, up: torch.Tensor, tanh: bool) -> torch.Tensor:
    flat, factor = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate, up))
    out = torch.empty_like(flat)
    for chunk in _chunks(flat):
        _activation(flat[chunk], tanh, out[chunk]).mul_(factor[chunk])
    return out.view(gate.shape)


def _applies(x: torch.Tensor) -> bool:
    """True in float32 or float64 on a CPU, where nothing is converted; also without gradient, so that policy and
    reference round alike."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0
    return plain and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def _norm_forward(self: Any, x: torch.Tensor) -> Any:
    if not (_applies(x) and self.weight.dtype == x.dtype):
        return type(self).forward(self, x)
    offset = _norm_offset(self)
    return _RMSNorm.apply(x, self.weight + offset if offset else self.weight, _eps(self))


def _mlp_forward(self: Any, x: torch.Tensor) -> Any:
    if not _applies(x):
        return type(self).forward(self, x)
    hidden: Any = _Gated.apply(self.gate_proj(x), self.up_proj(x), _is_gelu(self))
    return self.down_proj(hidden)


def _eps(norm: Any) -> float:
    return getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)


def _norm_offset(norm: Any) -> float:
    """1 for norms that multiply by 1 + weight, as Gemma's do, else 0."""
    return vars(norm)[_OFFSET]


def _is_gelu(mlp: Any) -> bool:
    return type(mlp.act_fn).__name__ == "GELUTanh"


def use_fused(model: torch.nn.Module) -> None:
    """Let the norms and gated MLPs of a model on a CPU that compute what this module does train by it.

    Each is compared with its class on a few random rows.
    """
    for module in model.modules():
        if "forward" in vars(module) or not (parameters := [*module.parameters()]):
            continue
        if any(p.device.type != "cpu" or p.dtype != torch.float32 or not p.numel() for p in parameters):
            continue
        if type(module).__name__.endswith("RMSNorm") and len(parameters) == 1 and hasattr(module, "weight"):
            offset = next((offset for offset in (0.0, 1.0) if _is_norm(module, offset)), None)
            if offset is not None:
                setattr(module, _OFFSET, offset)
                module.forward = types.MethodType(_norm_forward, module)
        elif type(module).__name__.endswith("MLP") and _is_gated(module):
            module.forward = types.MethodType(_mlp_forward, module)


def restore_plain(model: torch.nn.Module) -> None:
    """Undo `use_fused`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (_norm_forward, _mlp_forward):
            del module.forward
            vars(module).pop(_OFFSET, None)


def _rows(size: int) -> torch.Tensor:
    return torch.linspace(-2, 3, 4 * size).sin().view(1, 4, size)


def _is_norm(norm: Any, offset: float) -> bool:
    x = _rows(norm.weight.shape[-1])
    weight = x[0, 3].cos()  # weights of ones would not tell a factor of 2 from an offset of 1
    with torch.no_grad():
        return _agree(functional_call(norm, {"weight": weight}, x), _RMSNorm.apply(x, weight + offset, _eps(norm)))


def _is_gated(mlp: Any) -> bool:
    names = {name for name, _ in mlp.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    if type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU", "GELUTanh"):
        return False
    size = getattr(mlp.gate_proj, "in_features", None)
    if size is None:
        return False
    x = _rows(size)
    with torch.no_grad():
        hidden: Any = _Gated.apply(mlp.gate_proj(x), mlp.up_proj(x), _is_gelu(mlp))
        return _agree(mlp(x), mlp.down_proj(hidden))


def _agree(plain: torch.Tensor, fused: Any) -> bool:
    return plain.dtype == fused.dtype and torch.allclose(plain, fused, rtol=1e-5, atol=1e-6)
