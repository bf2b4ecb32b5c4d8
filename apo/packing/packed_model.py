"""Packed rows in any causal model: patch its forward and attention, verify the result, compute `PairLogps`.

The LM head is applied to trained positions only: those of a response, without the turns in it that the model does not
write. The log-prob of a response token that both responses share counts for both.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from apo.packing.attention import NAME, ORIGINAL_ATTENTION, fastest_backend
from apo.packing.batch import PairBatch
from apo.packing.fused import restore_plain, use_fused
from apo.packing.head import head_logps
from apo.packing.layout import PackedRow
from apo.packing.logps import PairLogps, padded_logps
from clair.core.errors import one_line
from clair.inference.generation.onednn import restore_linear, use_onednn

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose positions are mixed by the attention alone, which packed rows replace."""


def unsupported_reason(model: torch.nn.Module) -> str | None:
    """Why a model cannot run packed rows, or None. `matches_padded` still has to check it on real pairs."""
    base = _base_model(model)
    if any(
        getattr(config, "prompt_learning", False) or getattr(config, "is_prompt_learning", False)
        for config in getattr(model, "peft_config", {}).values()
    ):
        return "its adapter puts virtual tokens in front"
    attention = getattr(base.config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager", NAME):
        return f"its attention is {attention}, not one that transformers lets be exchanged"
    other_layers = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
    if other_layers or any(isinstance(module, torch.nn.Conv1d) for module in base.modules()):
        kind = ", ".join(sorted(other_layers)) or "convolution"
        return f"its layers of the kind {kind} carry one pair's tokens into the next pair of the row"
    if getattr(base.config.get_text_config(), "output_router_logits", None) is not None:
        return "it is a mixture of experts, whose routing loss counts tokens"
    return None


def enable_packing(model: torch.nn.Module, backend: str = "split") -> None:
    """Let a causal model, not yet wrapped by DDP or FSDP, take `shared_prefix=PackedRow`; other input is unchanged.

    With a packed row its forward returns the log-probs [M] of the row's labels. `backend` is a key of
    `attention.BACKENDS`.
    """
    base = _base_model(model)
    if "_plain_forward" in vars(base):
        return
    plain = base.forward

    def forward(self: Any, *args: Any, shared_prefix: PackedRow | None = None, **options: Any) -> Any:
        if shared_prefix is None:
            return plain(*args, **options)
        shared_prefix.backend = backend
        backbone = getattr(self, self.base_model_prefix)
        hidden = backbone(*args, shared_prefix=shared_prefix, **options).last_hidden_state
        return head_logps(self, hidden[0, shared_prefix.predictors], shared_prefix.labels)

    use_onednn(base)
    use_fused(base)
    base._plain_forward = plain
    base.forward = types.MethodType(forward, base)
    configs = {id(module.config): module.config for module in _with_config(base)}
    originals = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    for module in _with_config(base):
        if originals[id(module.config)] in ("sdpa", "eager"):
            # On the module: the config is saved with the model.
            setattr(module, ORIGINAL_ATTENTION, originals[id(module.config)])
            module.config._attn_implementation = NAME


def disable_packing(model: torch.nn.Module) -> None:
    """Undo `enable_packing`."""
    base = _base_model(model)
    if "_plain_forward" in vars(base):
        base.forward = vars(base).pop("_plain_forward")
        restore_linear(base)
        restore_plain(base)
        for module in _with_config(base):
            if ORIGINAL_ATTENTION in vars(module):
                module.config._attn_implementation = vars(module).pop(ORIGINAL_ATTENTION)


def _with_config(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "config")]


def enable_packing_if_exact(
    models: Sequence[torch.nn.Module],
    pairs: PairBatch,
    batch: PairBatch,
    dtype: torch.dtype,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    fatal: Callable[[Exception], bool] = lambda _: False,
) -> tuple[str | None, list[str]]:
    """Enable packing if all models support it and the first one matches TRL's stacked batch on a few `pairs`.

    The models are on `device`. Attention uses the fastest backend for a row like `batch` in `dtype`. Returns None, or
    the reason why packing stays off, and notes for the user. An error counts as a reason unless it is `fatal`.
    """
    reason = next((reason for model in models if (reason := unsupported_reason(model))), None)
    if reason is not None:
        return reason, []
    config = _base_model(models[0]).config.get_text_config()
    best, message = fastest_backend(config, batch.row(device), dtype)
    notes = [message] if message else []
    with torch.no_grad(), autocast():
        padded = padded_logps(models[0], {key: value.to(device) for key, value in pairs.stacked.items()})
    for backend in dict.fromkeys((best, "split")):
        for model in models:
            enable_packing(model, backend)
        try:
            with autocast():
                exact = matches_padded(models[0], pairs.row(device), padded, dtype)
            reason = None if exact else "its log-probs differ in packed rows"
        except (RuntimeError, TypeError, ValueError) as error:
            if fatal(error):
                raise
            reason = one_line(error)
        if reason is None:
            break
        notes.append(f"attention of packed rows: {backend} is not used, {reason}")
        for model in models:
            disable_packing(model)
    return reason, notes if reason is None else []


def matches_padded(model: torch.nn.Module, row: PackedRow, padded: PairLogps, dtype: torch.dtype) -> bool:
    """True if a packed row gives the log-probs of TRL's stacked batch, up to the rounding of products in `dtype`."""
    with torch.no_grad():
        packed = packed_logps(model, row)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    return all(
        torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=20 * tolerance)
        for actual, expected in ((packed.chosen, padded.chosen), (packed.rejected, padded.rejected))
    )


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def packed_logps(model: torch.nn.Module, packed: PackedRow) -> PairLogps:
    """`PairLogps` of the pairs in a packed row, by a model with packing enabled."""
    # transformers passes a mask of 4 dimensions on untouched.
    placeholder = torch.ones(1, 1, 1, 1, device=packed.input_ids.device)
    logps = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=placeholder,
        use_cache=False,
        shared_prefix=packed,
    )
    sums = logps.new_zeros(3 * packed.pairs).index_add(0, packed.owner, logps).view(-1, 3)
    chosen_len, rejected_len = packed.lengths.T
    return PairLogps(sums[:, 0] + sums[:, 1], sums[:, 0] + sums[:, 2], chosen_len, rejected_len)
