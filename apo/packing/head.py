"""The LM head on trained positions only, chunk by chunk, with a backward pass that stores no more than a budget."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from clair.inference.generation.onednn import product

HEAD_CHUNK = 1024
"""Rows of the LM head per chunk: logits of this many positions are in memory at a time."""
_STORED_BYTES = 512 * 2**20
"""Bytes of exponentiated logits that may be stored for the backward pass; above, backward recomputes them by chunk."""


class _HeadLogps(torch.autograd.Function):
    """log softmax(scale * hidden @ weight.T + bias)[label], [M], chunk by chunk; products in the dtype of `hidden`.

    The backward pass needs exp(logits - their maximum): `store` says whether forward stores them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, scale: float, softcap: float | None, store: bool
    ) -> Any:
        logps, maxima, totals, stored = [], [], [], []
        factor = weight.to(hidden.dtype)
        for start in range(0, len(hidden), HEAD_CHUNK):
            chunk = slice(start, start + HEAD_CHUNK)
            logits = _logits(hidden[chunk], factor, bias, scale, softcap)
            picked, maximum = logits.gather(-1, labels[chunk, None]), logits.amax(-1, keepdim=True)
            total = logits.sub_(maximum).exp_().sum(-1, keepdim=True)
            logps.append((picked - maximum - total.log()).squeeze(-1))
            maxima.append(maximum)
            totals.append(total)
            stored += [logits] if store else []
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(maxima), torch.cat(totals))
        ctx.scale, ctx.softcap, ctx.stored = scale, softcap, stored
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        hidden, weight, bias, labels, maxima, totals = ctx.saved_tensors
        stored, ctx.stored = ctx.stored, []  # overwritten in place below; a second backward pass recomputes them
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden, grad_weight = [], None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        grad, factor = (grad_outputs[0].float() * ctx.scale)[:, None], weight.to(hidden.dtype)
        for start in range(0, len(hidden), HEAD_CHUNK):
            chunk, softcap_slope = slice(start, start + HEAD_CHUNK), None
            if not stored:
                logits = _logits(hidden[chunk], factor, bias, ctx.scale, ctx.softcap)
                softcap_slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
                exps = logits.sub_(maxima[chunk]).exp_()
            else:
                exps = stored.pop(0)
            grad_logits = exps.mul_(-grad[chunk] / totals[chunk]).scatter_add_(-1, labels[chunk, None], grad[chunk])
            if softcap_slope is not None:
                grad_logits.mul_(softcap_slope)
            grad_logits = grad_logits.to(hidden.dtype)
            if needs_hidden:
                grad_hidden.append(product(grad_logits, factor.T, len(grad_logits)))
            if needs_weight:
                grad_chunk = product(hidden[chunk].T, grad_logits.T, len(grad_logits))
                grad_weight = grad_chunk.float() if grad_weight is None else grad_weight.add_(grad_chunk)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        grad_weight = None if grad_weight is None else grad_weight.T.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.saved_tensors[2].dtype)
        return torch.cat(grad_hidden) if needs_hidden else None, grad_weight, grad_bias, None, None, None, None


def _logits(rows: Any, weight: Any, bias: Any, scale: float, softcap: float | None) -> Any:
    """Logits in float32."""
    if bias is None:
        logits = product(rows, weight, len(rows)).float()
    else:
        logits = torch.nn.functional.linear(rows, weight, bias.to(rows.dtype)).float()
    return scale_logits(logits, scale, softcap)


def scale_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """The model's logits from the products of its head, in place: softcap * tanh(scale * logits / softcap)."""
    logits = logits if scale == 1.0 else logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def stores_logits(labels: int, vocabulary: int) -> bool:
    """True if the exponentiated logits of the head, in float32, fit the budget and stay in memory until backward."""
    return 4 * labels * vocabulary <= _STORED_BYTES


def head_logps(model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probs of `labels` [M] predicted by the first M rows of `hidden` [N, h], in nats, float32.

    Raises RuntimeError if the head's weight is sharded and its module does not gather it.
    """
    head = cast(Any, model.get_output_embeddings())
    scale, softcap = logit_scaling(model.config)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = head.weight, head.bias
        if hasattr(weight, "full_tensor"):  # its gradient would stay that of this process
            raise RuntimeError("its LM head is sharded and not gathered when it is called")
        store = torch.is_grad_enabled() and softcap is None and stores_logits(len(hidden), len(weight))
        padded_labels = torch.nn.functional.pad(labels, (0, len(hidden) - len(labels)))
        device, dtype = hidden.device.type, weight.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # applied here, because backward runs outside of autocast
        arguments = hidden.to(dtype), weight, bias, padded_labels, scale, softcap, store
        logps = cast(torch.Tensor, _HeadLogps.apply(*arguments))
        return logps[: len(labels)]

    # Called as a module: FSDP gathers the weight and reduces its gradient around the call.
    replaced = vars(head).get("forward")
    head.forward = forward
    try:
        return head(hidden)
    finally:
        del head.forward
        if replaced is not None:
            head.forward = replaced


def logit_scaling(config: Any) -> tuple[float, float | None]:
    """The factor and the soft cap of a model family's logits.

    Cohere has `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 has `final_logit_softcapping`.
    """
    config = config.get_text_config()
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    factor = float(scale) if scale is not None else 1.0 if divisor is None else 1.0 / float(divisor)
    return factor, getattr(config, "final_logit_softcapping", None)
