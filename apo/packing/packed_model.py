"""Shared prefixes: one row for many pairs, no padding, each prompt run once, exact.

A pair becomes `shared, chosen rest, rejected rest`: `shared` is the longest common prefix of both sequences, prompt and
any common beginning of the responses. Positions of the rejected rest go on from the shared part, and it attends to the
shared part and to itself, never to the chosen rest (attention.py). Pairs stand one behind the other in a single row and
do not see each other. The LM head is applied to trained positions only: those of a response, without the turns in it
that are not the model's. The log-prob of a shared response token counts for both.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, compress
from typing import Any

import torch

from apo.data.rendering import common_prefix
from apo.packing.async_copy import to_device
from apo.packing.attention import NAME, ORIGINAL_ATTENTION, PackedRow, PairSpan, fastest_backend
from apo.packing.logps import SIDES, Batch, PairLogps, logps_device, padded_logps, response_mask, uncollate
from apo.packing.onednn import product, restore_linear, rows_multiple, use_onednn
from clair.core.errors import one_line

_HEAD_CHUNK = 1024
"""Rows of the LM head at once: logits of this many positions are in memory at a time."""
_HEAD_KEEPS = 512 * 2**20
"""Bytes of exponentiated logits that may wait for backward; above, they are made anew there, chunk by chunk."""


def shared_response_length(example: dict[str, list[int]]) -> int:
    """How many tokens the responses of a pair begin with in common, trained in both or in neither."""
    both = common_prefix(example["chosen_ids"], example["rejected_ids"])
    if example.get("chosen_mask") or example.get("rejected_mask"):
        return common_prefix(*(response_mask(example, side)[:both] for side in SIDES))
    return both


def packed_length(example: dict[str, list[int]]) -> int:
    """How many tokens a pair takes in a packed row."""
    prompt, chosen, rejected = (example[f"{name}_ids"] for name in ("prompt", *SIDES))
    return len(prompt) + len(chosen) + len(rejected) - shared_response_length(example)


def crop_around_divergence(example: dict[str, Any], most: int = 128) -> dict[str, Any]:
    """A pair cut to at most `most` tokens before and `most` after a place shortly before its answers part."""
    prompt, chosen, rejected = (example[f"{name}_ids"] for name in ("prompt", *SIDES))
    start = max(0, shared_response_length(example) - most // 4)
    part = slice(start, start + most)
    cut = {"prompt_ids": [*prompt, *chosen[:start]][-most:], "chosen_ids": chosen[part], "rejected_ids": rejected[part]}
    masks = {f"{side}_mask": response_mask(example, side)[part] for side in SIDES if example.get(f"{side}_mask")}
    return {**example, **cut, **{name: [1, *mask[1:]][: len(mask)] for name, mask in masks.items()}}


def pack_pairs(
    examples: Sequence[dict[str, list[int]]], device: torch.device | str = "cpu", multiple: int = 1
) -> PackedRow:
    """Pack pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) into one row, in their order.

    The row is filled up to a `multiple` of tokens, and of predicting states, by some that nobody reads or predicts.
    Of an unpaired row one response is empty; the other stands in the shared part, with no branches after it.
    Raises ValueError for a pair with an empty prompt or no response: nothing would predict its first token.
    """
    ids: list[int] = []
    positions: list[int] = []
    spans: list[PairSpan] = []
    rows: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    lengths: list[int] = []
    for pair, example in enumerate(examples):
        prompt, chosen, rejected = (example[f"{name}_ids"] for name in ("prompt", *SIDES))
        if not (prompt and (chosen or rejected)):
            raise ValueError("a pair with an empty prompt or no response cannot be packed")
        paired = bool(chosen and rejected)
        both = shared_response_length(example) if paired else len(chosen or rejected)
        trained, others = (response_mask(example, side) for side in SIDES)
        lengths += [sum(trained), sum(others)]
        shared, start = len(prompt) + both, len(ids)
        span = PairSpan(start, shared, len(chosen[both:]), len(rejected[both:]))
        spans.append(span)
        ids += [*prompt, *(chosen or rejected), *rejected[both:]]
        positions += [*range(shared + span.chosen), *range(shared, shared + span.rejected)]
        last = start + shared - 1
        middle, end = last + span.chosen, last + span.chosen + span.rejected
        predicted = (
            (0 if paired else 1 if chosen else 2, (chosen or rejected)[:both], (trained or others)[:both],
             range(start + len(prompt) - 1, last)),
            (1, chosen[both:], trained[both:], chain([last], range(last + 1, middle))),
            (2, rejected[both:], others[both:], chain([last], range(middle + 1, end))),
        )  # fmt: skip
        for which, tokens, mask, before in predicted:
            rows += compress(before, mask)
            labels += compress(tokens, mask)
            owner += [3 * pair + which] * sum(mask)
    if short := -len(ids) % multiple:
        spans.append(PairSpan(len(ids), short, 0, 0))
        ids += [0] * short
        positions += range(short)
    rows += [0] * (-len(rows) % multiple)
    parts = (ids, positions, rows, labels, owner, lengths)
    sent = to_device(torch.tensor([*chain(*parts)]), torch.device(device)).split([len(part) for part in parts])
    return PackedRow(sent[0][None], sent[1][None], spans, *sent[2:5], sent[5].view(-1, 2))


def pack_bins(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Places of `sizes` in few bins of at most `most`, by first-fit decreasing; a larger one has a bin of its own."""
    bins: list[tuple[int, list[int]]] = []
    for place in sorted(range(len(sizes)), key=lambda p: (-sizes[p], p)):
        for index, (filled, places) in enumerate(bins):
            if filled + sizes[place] <= most:
                places.append(place)
                bins[index] = (filled + sizes[place], places)
                break
        else:
            bins.append((sizes[place], [place]))
    return [sorted(places) for _, places in bins]


# ---- the LM head on response positions


class _HeadLogps(torch.autograd.Function):
    """log softmax(scale * hidden @ weight.T + bias)[label], [M], chunk by chunk; products in the type of `hidden`.

    Backward needs exp(logits - their maximum): `keep` says whether they stay in memory or are made anew.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, scale: float, softcap: float | None, keep: bool
    ) -> Any:
        logps, tops, totals, kept = [], [], [], []
        factor = weight.to(hidden.dtype)
        for start in range(0, len(hidden), _HEAD_CHUNK):
            part = slice(start, start + _HEAD_CHUNK)
            logits = _logits(hidden[part], factor, bias, scale, softcap)
            picked, top = logits.gather(-1, labels[part, None]), logits.amax(-1, keepdim=True)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            logps.append((picked - top - total.log()).squeeze(-1))
            tops.append(top)
            totals.append(total)
            kept += [logits] if keep else []
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(tops), torch.cat(totals))
        ctx.scale, ctx.softcap, ctx.kept = scale, softcap, kept
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        hidden, weight, bias, labels, tops, totals = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, []  # overwritten below; a second backward makes it anew
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden, grad_weight = [], None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        grad, factor = (grad.float() * ctx.scale)[:, None], weight.to(hidden.dtype)
        for start in range(0, len(hidden), _HEAD_CHUNK):
            part, flatness = slice(start, start + _HEAD_CHUNK), None
            if not kept:
                logits = _logits(hidden[part], factor, bias, ctx.scale, ctx.softcap)
                flatness = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
                exps = logits.sub_(tops[part]).exp_()
            else:
                exps = kept.pop(0)
            slope = exps.mul_(-grad[part] / totals[part]).scatter_add_(-1, labels[part, None], grad[part])
            if flatness is not None:
                slope.mul_(flatness)
            slope = slope.to(hidden.dtype)
            if needs_hidden:
                grad_hidden.append(product(slope, factor.T, len(slope)))
            if needs_weight:
                mine = product(hidden[part].T, slope.T, len(slope))
                grad_weight = mine.float() if grad_weight is None else grad_weight.add_(mine)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        grad_weight = None if grad_weight is None else grad_weight.T
        cast = (None if g is None else g.to(t.dtype) for g, t in ((grad_weight, weight), (grad_bias, bias)))
        return torch.cat(grad_hidden) if needs_hidden else None, *cast, None, None, None, None


def _logits(rows: Any, weight: Any, bias: Any, scale: float, softcap: float | None) -> Any:
    """Logits in float32."""
    if bias is None:
        logits = product(rows, weight, len(rows)).float()
    else:
        logits = torch.nn.functional.linear(rows, weight, bias.to(rows.dtype)).float()
    logits = logits if scale == 1.0 else logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def stores_logits(labels: int, vocabulary: int) -> bool:
    """Whether the head's exponentiated logits stay in memory until backward: at most `_HEAD_KEEPS` bytes of them."""
    return 4 * labels * vocabulary <= _HEAD_KEEPS


def head_logps(model: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probs of `labels` [M] predicted by the first M of `hidden`, [N, h], in nats, float32."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = head.weight, head.bias
        if hasattr(weight, "full_tensor"):  # its gradient would stay that of this process
            raise RuntimeError("its LM head is sharded and not gathered when it is called")
        keep = torch.is_grad_enabled() and softcap is None and stores_logits(len(hidden), len(weight))
        filled = torch.nn.functional.pad(labels, (0, len(hidden) - len(labels)))
        device, dtype = hidden.device.type, weight.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # said here, since backward runs outside of it
        found = _HeadLogps.apply(hidden.to(dtype), weight, bias, filled, _logit_scale(config), softcap, keep)
        return found[: len(labels)]

    before = vars(head).get("forward")
    head.forward = forward
    try:
        return head(hidden)  # as a module: FSDP gathers its weight and reduces its gradient around the call
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _logit_scale(config: Any) -> float:
    """What a family multiplies its logits by: Cohere's `logit_scale`, Granite divides by `logits_scaling`."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    dividing = getattr(config, "logits_scaling", None)
    return 1.0 if dividing is None else 1.0 / float(dividing)


# ---- the model


def unsupported_reason(model: torch.nn.Module) -> str | None:
    """Why a model cannot run packed rows, or None. `matches_padded` still has to check it on real pairs."""
    base = _base_model(model)
    if any(getattr(config, "prompt_learning", False) or getattr(config, "is_prompt_learning", False)
           for config in getattr(model, "peft_config", {}).values()):  # fmt: skip
        return "its adapter puts virtual tokens in front"
    attention = getattr(base.config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager", NAME):
        return f"its attention is {attention}, not one that transformers lets be exchanged"
    if getattr(base.config.get_text_config(), "output_router_logits", None) is not None:
        return "it is a mixture of experts, whose routing loss counts tokens"
    return None


def enable_packing(model: torch.nn.Module, way: str = "split") -> None:
    """Let a causal model, not yet wrapped by DDP or FSDP, be asked with `shared_prefix=layout`; nothing else changes.

    Asked so, it returns the log-probs [M] of the layout's labels. `way` is one of attention.py's.
    """
    base = _base_model(model)
    if "_plain_forward" in vars(base):
        return
    plain = base.forward

    def forward(self: Any, *args: Any, shared_prefix: PackedRow | None = None, **options: Any) -> Any:
        if shared_prefix is None:
            return plain(*args, **options)
        shared_prefix.way = way
        backbone = getattr(self, self.base_model_prefix)
        hidden = backbone(*args, shared_prefix=shared_prefix, **options).last_hidden_state
        return head_logps(self, hidden[0, shared_prefix.rows], shared_prefix.labels)

    use_onednn(base)
    base._plain_forward = plain
    base.forward = types.MethodType(forward, base)
    configs = {id(module.config): module.config for module in base.modules() if hasattr(module, "config")}
    before = {place: getattr(config, "_attn_implementation", None) for place, config in configs.items()}
    for module in base.modules():
        if hasattr(module, "config") and before[id(module.config)] in ("sdpa", "eager"):
            setattr(module, ORIGINAL_ATTENTION, before[id(module.config)])  # not in the config, which is saved
            module.config._attn_implementation = NAME


def disable_packing(model: torch.nn.Module) -> None:
    """Undo `enable_packing`."""
    base = _base_model(model)
    if "_plain_forward" in vars(base):
        base.forward = vars(base).pop("_plain_forward")
        restore_linear(base)
        for module in base.modules():
            if ORIGINAL_ATTENTION in vars(module):
                module.config._attn_implementation = vars(module).pop(ORIGINAL_ATTENTION)


def enable_packing_if_exact(
    models: Sequence[torch.nn.Module],
    pairs: Batch,
    batch: Batch,
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    fatal: Callable[[Exception], bool] = lambda _: False,
) -> tuple[str | None, list[str]]:
    """Let models share prefixes if all can and the first agrees with TRL's stacked batch on a few `pairs`.

    Attention goes the way that is fastest on a row like `batch` in `dtype`. Returns None, or why they do not share,
    and what is to be told. An error is a reason, unless it is `fatal`.
    """
    reason = next((why for model in models if (why := unsupported_reason(model))), None)
    if reason is not None:
        return reason, []
    layout = pack_pairs(uncollate(batch), batch["input_ids"].device)
    best, told = fastest_backend(_base_model(models[0]).config.get_text_config(), layout, dtype)
    notes = [told] if told else []
    with torch.no_grad(), autocast():
        plain = padded_logps(models[0], pairs)
    for way in dict.fromkeys((best, "split")):
        for model in models:
            enable_packing(model, way)
        try:
            with autocast():
                reason = (
                    None if matches_padded(models[0], pairs, plain, dtype) else "its log-probs differ in packed rows"
                )
        except (RuntimeError, TypeError, ValueError) as error:
            if fatal(error):
                raise
            reason = one_line(error)
        if reason is None:
            break
        notes.append(f"attention of packed rows: {way} is not taken, {reason}")
        for model in models:
            disable_packing(model)
    return reason, notes if reason is None else []


def matches_padded(model: torch.nn.Module, batch: Batch, plain: PairLogps, dtype: torch.dtype) -> bool:
    """Whether packed rows give what TRL's stacked batch gave, up to the rounding of products in `dtype`."""
    with torch.no_grad():
        packed = shared_prefix_logps(model, batch)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    return all(
        torch.allclose(mine.float(), other.float(), rtol=tolerance, atol=20 * tolerance)
        for mine, other in zip(packed[:2], plain[:2], strict=True)
    )


def _base_model(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def packed_logps(model: torch.nn.Module, layout: PackedRow) -> PairLogps:
    """`PairLogps` of the pairs in a packed row, by a model that shares prefixes."""
    unused = torch.ones(1, 1, 1, 1, device=layout.input_ids.device)  # a mask of 4 dimensions is handed on untouched
    logps = model(
        input_ids=layout.input_ids, position_ids=layout.position_ids, attention_mask=unused, use_cache=False,
        shared_prefix=layout,
    )  # fmt: skip
    sums = logps.new_zeros(3 * layout.pairs).index_add(0, layout.owner, logps).view(-1, 3)
    return PairLogps(sums[:, 0] + sums[:, 1], sums[:, 0] + sums[:, 2], *layout.lengths.T)


def shared_prefix_logps(model: torch.nn.Module, batch: Batch, **options: Any) -> PairLogps:
    """`PairLogps` of a stacked batch by packing it into one row: the fast twin of `padded_logps`."""
    if options:
        raise ValueError(f"{', '.join(options)} cannot be asked for with shared prefixes")
    device = logps_device(batch)
    return packed_logps(model, pack_pairs(uncollate(batch), device, rows_multiple(device)))
