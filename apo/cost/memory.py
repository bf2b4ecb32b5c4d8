"""Estimates of a run's peak memory, FLOPs and time, from its config and pairs, before any weight is loaded.

The docstrings below state the formulas for FLOPs and bytes. They hold for decoders of the Llama kind, in packed rows
(apo.packing.packed_model) or in TRL's padded batch. Their inputs come from sizes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from apo.cost.deepspeed_memory import ZeroConfig, zero_memory
from apo.cost.sizes import ModelSizes, PassCost, pass_costs
from apo.heap import reuses_memory
from apo.packing.head import HEAD_CHUNK, stores_logits
from clair.inference.generation.onednn import has_bfloat16, rows_multiple

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE_SIZE = 2048
"""Pairs whose lengths are read; from a longer dataset, every n-th."""
STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}
"""Numbers that an optimizer stores per trained parameter, by a prefix of its name; others count as AdamW."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: 4 bits, a constant of 8 bits for 64 weights, one of 32 bits for 256 constants."""
TRL_TILE, TRL_SLOPE = (4096, 32_768), 29
"""Positions and vocabulary of a tile of TRL 1.16's head, and the bytes of a logit's gradient on a CPU: seven
float32 numbers and a flag."""
HOLES, FEWER_HOLES = 0.45, 0.3
"""MEASURED, not derived: what glibc's allocator wastes on a CPU under `apo.heap.TUNABLES`, in activations of all layers
without checkpointing; the second with checkpointing or in 4 bits. Also without these settings in TRL's padded batch,
whose buffers are so large that they go back to the system.
"""
PLAIN_HOLES, PLAIN_CHECKPOINTING_HOLES, PLAIN_ADAPTER_HOLES, MKL_FACTOR = 0.75, 0.7, 1.25, 1.4
"""The same in packed rows without these settings, the third for an adapter in float32. The factor is for float32 if MKL
makes the products, because oneDNN is no faster here. Equal runs differ by a fifth (docs/log).
"""


@dataclass(frozen=True)
class Job:
    """The properties of a run that determine its costs. With several `processes`, all costs are those of one.

    rows            forward passes of an epoch over the sampled pairs
    padded_tokens   tokens of these pairs in TRL's padded batch, an epoch
    pairs           sampled pairs
    pairs_trained   how many of them the whole run trains on, with repetitions
    stands_for      pairs of the dataset that each sampled pair represents
    weight          bytes of a stored number
    compute         bytes of a number in a matrix product
    states          numbers per parameter that the optimizer stores
    mismatched      True if each pair also runs with its neighbour's response, for KTO's kl
    sharded         True if processes share weights, gradients and states (FSDP2)
    zero            what processes share under DeepSpeed
    quantized       True if the linear layers below an adapter are in NF4
    mixed           True under autocast
    packed          False for TRL's padded batch
    pack_tokens     maximum tokens of a pass; None: no limit
    """

    sizes: ModelSizes
    rows: tuple[PassCost, ...]
    padded_tokens: int
    pairs: int
    pairs_trained: int
    stands_for: int
    weight: int
    compute: int
    states: int
    checkpointing: bool
    accumulates: bool
    copies: bool
    reference: str | None
    on_gpu: bool = False
    mismatched: bool = False
    processes: int = 1
    sharded: bool = False
    quantized: bool = False
    mixed: bool = False
    zero: ZeroConfig | None = None
    packed: bool = True
    pack_tokens: int | None = None

    @property
    def trained_weight(self) -> int:
        """Bytes of a trained parameter, its gradient and each of its optimizer's states; an adapter is in float32."""
        return 4 if self.is_adapter else self.weight

    @property
    def is_adapter(self) -> bool:
        """True if only an adapter is trained."""
        return self.sizes.adapter > 0


# ---- the costs


def forward_flops(sizes: ModelSizes, row: PassCost) -> float:
    """Return the FLOPs of a forward pass.

    2 x linear weights x tokens + 4 x layers x head width x query-key products + 2 x hidden x vocabulary x labels
    """
    return _body_flops(sizes, row) + 2 * sizes.hidden * sizes.vocabulary * row.labels


def _body_flops(sizes: ModelSizes, row: PassCost) -> float:
    return 2 * (sizes.linear + sizes.adapter) * row.tokens + 4 * sizes.layers * sizes.heads * row.products


def step_flops(job: Job, row: PassCost) -> float:
    """Return the FLOPs of forward and backward of one pass.

    Backward: twice the forward of each trained matrix, once that of a frozen one (no weight gradient), 2.5 times that
    of attention (it recomputes the scores), once that of the head (twice if it is trained), and once more if its logits
    are recomputed. Activation checkpointing adds another forward of the body.
    """
    sizes = job.sizes
    attention = 4 * sizes.layers * sizes.heads * row.products
    matrices = sizes.linear * (1 if job.is_adapter else 2) + 2 * sizes.adapter
    times = (1 if job.is_adapter else 2) + (not (job.packed and stores_logits(row.labels, sizes.vocabulary)))
    head = 2 * sizes.hidden * sizes.vocabulary * row.labels * times
    recomputed = _body_flops(sizes, row) if job.checkpointing else 0
    return forward_flops(sizes, row) + 2 * matrices * row.tokens + 2.5 * attention + head + recomputed


def run_flops(job: Job) -> tuple[float, float]:
    """Return the FLOPs of one process, and those of them that the reference needs.

    A cached reference computes one forward per pair, divided among the processes; an online one, a forward per trained
    pair. Mismatched responses need one more forward of both models per trained pair.
    """
    epochs = job.pairs_trained / job.pairs
    forward = sum(forward_flops(job.sizes, row) for row in job.rows) * job.stands_for
    mismatched = epochs * forward if job.mismatched else 0
    reference = {"cached": 1 / job.processes, "online": epochs}.get(job.reference or "", 0) * forward + mismatched
    steps = epochs * job.stands_for * sum(step_flops(job, row) for row in job.rows)
    return steps + mismatched + reference, reference


def peak_memory(job: Job) -> dict[str, float]:
    """Return the bytes at the peak, by what they hold.

    weights      parameters x bytes, twice with a copy for the reference; in mixed precision also the 2-byte copies
    optimizer    states x trained parameters x bytes
    activations  `activation_bytes` of the largest pass

    The peak is the larger of two moments. At the start of backward: activations, the head's buffers and, if gradients
    accumulate, all gradients. At the end of backward: all gradients and one layer's activations.

    On a CPU, what the allocator wastes is added; a GPU's allocator is assumed to waste nothing. If the model's file has
    numbers of another type, both copies exist while it is read.

    With sharding (FSDP2), a process stores its shard of weights, gradients and states, and gathers `_gathered_bytes` in
    the type of the matrix products. Before that it holds the whole model, for the reference, which counts if it is the
    peak. DDP's buckets are a second copy of the gradients. For ZeRO, see deepspeed_memory.py.
    """
    sizes, shares = job.sizes, job.processes if job.sharded else 1
    stored = sizes.parameters * job.weight * (2 if job.copies else 1) + sizes.adapter * job.trained_weight
    cast = sizes.linear * job.compute if job.compute < job.weight else 0
    if job.quantized:  # one matrix at a time is converted to the type of the products
        stored, cast = stored - sizes.linear * (job.weight - NF4), sizes.hidden * sizes.inner * job.compute
    weights = stored / shares + (_gathered_bytes(job) if shares > 1 else cast)
    optimizer = job.states * sizes.trained * job.trained_weight / shares
    gradients = sizes.trained * job.trained_weight / shares
    early = gradients if job.accumulates else 0
    if job.zero:
        zero = zero_memory(sizes, job.zero, job.states, job.processes, on_gpu=job.on_gpu, accumulates=job.accumulates)
        weights, optimizer, early, gradients = zero.weights, zero.optimizer, zero.begin, zero.end
    activations = max(activation_bytes(job, row) for row in job.rows)
    head = max(_head_bytes(job, row) for row in job.rows)
    # The gradients within one gated MLP: 3 i + 2 h numbers per token.
    working = max(row.tokens for row in job.rows) * (3 * sizes.inner + 2 * sizes.hidden) * job.compute
    start, end = activations + max(head, working), working + activations / sizes.layers
    peak_at_end = early + start < gradients + end
    moment = {"gradients": gradients if peak_at_end else early, "activations": end if peak_at_end else start}
    holes = 0 if job.on_gpu else max(_hole_bytes(job, row) for row in job.rows)
    memory: dict[str, float] = {"weights": weights, "optimizer": optimizer, **moment, "allocator": holes}
    if not (job.on_gpu or job.quantized or job.zero) and sizes.stored not in (None, job.weight):
        read = sizes.parameters * (sizes.stored + job.weight)
        memory["file while it is read"] = max(0, read - sum(memory.values()))
    if shares > 1:
        return memory | {"whole model before it is sharded": max(0, stored + cast - sum(memory.values()))}
    if job.zero and job.zero.stage == 3:
        unsharded = (sizes.parameters + sizes.adapter) * (2 if job.zero.half else 4)
        return memory | {"whole model before it is sharded": max(0, unsharded - sum(memory.values()))}
    return memory | ({"buckets": gradients} if job.processes > 1 and not job.zero else {})


def _gathered_bytes(job: Job) -> float:
    """Return the bytes that FSDP2 gathers: two layers (one is prefetched), and embeddings, head and last norm; twice
    that with their gradients if they are trained.
    """
    sizes = job.sizes
    gathered = sizes.parameters - sizes.linear + 2 * sizes.linear / sizes.layers
    return gathered * job.compute * (1 if job.is_adapter else 2)


def activation_bytes(job: Job, row: PassCost) -> float:
    """Return the bytes that forward stores for backward in all layers; with checkpointing, each layer's input and one
    layer.

    Per token and layer, with h hidden, a = heads x head width, i inner, w and c the bytes of `weight` and `compute`:

    norms            h (4 + w) each: the input in float32, and the normed input if the norm's weight is trained
    attention        4 a c: queries, keys and values (repeated to all heads), and the output
    gated MLP        3 i c
    matrix inputs    (2 h + a + i) c. If they are converted to another type, queries, keys and values each store a copy:
                     (5 h + a + i) c under autocast, with c = 4 if the adapter is in float32 and the weights are not

    Rejected branches store their own keys and values, 2 a c each, and a float mask, c per query-key product.

    Packed rows in float32 on a CPU (`apo.packing.fused`, `apo.packing.attention`) store 4 h for a norm, 2 i c for a
    gated MLP that is not in 4 bits, nothing for the input of a matrix after these two, and nothing more for rejected
    branches.
    """
    layer = _layer_bytes(job, row)
    if job.checkpointing:
        residual = max(job.weight, job.compute)
        return job.sizes.layers * row.tokens * job.sizes.hidden * residual + layer
    return job.sizes.layers * layer


def _layer_bytes(job: Job, row: PassCost) -> float:
    sizes, c = job.sizes, job.compute
    by_hand = job.packed and not job.on_gpu and c == 4 and not job.mixed
    recomputed = by_hand and not job.quantized
    norms = 2 * sizes.hidden * (4 + (0 if job.is_adapter or by_hand else job.weight))
    converted = job.mixed or (job.is_adapter and c < 4 and not job.zero)  # DeepSpeed rounds the adapter too
    normed = 0 if by_hand else 5 if converted else 2
    inputs = normed * sizes.hidden + sizes.heads + (0 if recomputed else sizes.inner)
    inputs *= c if job.mixed or not converted else 4
    gated = (
        (2 if recomputed else 3) * sizes.inner * (job.weight if job.quantized else c)
    )  # bitsandbytes returns the type of its input
    copies = 0 if by_hand else 2 * sizes.heads * c * row.keys + c * row.masked
    return (norms + inputs + 4 * sizes.heads * c + gated) * row.tokens + copies


def _hole_bytes(job: Job, row: PassCost) -> float:
    in_float32 = job.compute == 4
    if reuses_memory() or not job.packed:
        holes = FEWER_HOLES if job.quantized or job.checkpointing else HOLES
    else:
        plain = PLAIN_ADAPTER_HOLES if job.is_adapter and in_float32 else PLAIN_HOLES
        holes = PLAIN_CHECKPOINTING_HOLES if job.checkpointing else plain
        holes *= MKL_FACTOR if in_float32 and rows_multiple(torch.device("cpu")) == 1 else 1
    return holes * job.sizes.layers * _layer_bytes(job, row)


def _head_bytes(job: Job, row: PassCost) -> float:
    """Return the bytes of the head's buffers in backward.

    Logits in float32 (stored for all labels, or computed per chunk), hidden states and their gradient; below float32
    also the rounded chunk. If the head is trained, also its gradient in float32 and, with several chunks, one product
    to be added to it. A CPU that multiplies bfloat16 in float32 makes copies in float32. In TRL's padded batch: a tile
    of logits, on a CPU with the buffers of its gradient, and both gradients in float32.
    """
    sizes = job.sizes
    if not job.packed:
        tile = min(row.labels, TRL_TILE[0]) * min(sizes.vocabulary, TRL_TILE[1])
        gradients = 4 * sizes.hidden * (row.labels + (0 if job.is_adapter else sizes.vocabulary))
        return tile * (job.compute + (0 if job.on_gpu else TRL_SLOPE)) + gradients
    chunk, rounded = min(row.labels, HEAD_CHUNK), job.compute if job.compute < 4 else 0
    logits = 4 * (row.labels if stores_logits(row.labels, sizes.vocabulary) else chunk) + rounded * chunk
    product = job.compute if row.labels > HEAD_CHUNK else rounded
    trained = 0 if job.is_adapter else (4 + product) * sizes.hidden
    converted = 0 if job.on_gpu or job.compute != 2 or has_bfloat16() else 4 * (chunk + sizes.hidden)
    return sizes.vocabulary * (logits + trained + converted) + 2 * row.labels * sizes.hidden * job.compute


# ---- the run


def sample_pairs(dataset: Dataset) -> tuple[list[dict[str, Any]], int]:
    """At most `SAMPLE_SIZE` pairs of a dataset, every n-th, and n."""
    stride = -(-len(dataset) // SAMPLE_SIZE)
    return [dataset[row] for row in range(0, len(dataset), stride)], stride


def build_job(
    sizes: ModelSizes,
    examples: Sequence[dict[str, Any]],
    args: Any,
    steps: int,
    *,
    reference: str | None,
    pack_tokens: int | None,
    stands_for: int = 1,
    dtype: str = "float32",
    mixed: bool = False,
    checkpointing: bool = False,
    on_gpu: bool = False,
    mismatched: bool = False,
    processes: int = 1,
    sharded: bool = False,
    quantized: bool = False,
    zero: ZeroConfig | None = None,
) -> Job:
    """Build a job from the trainer's options and tokenised pairs, each of which `stands_for` as many of the dataset.

    `reference` is "cached", "online" or None.
    """
    batch = args.per_device_train_batch_size
    rows = pass_costs(examples, batch, pack_tokens, args.shared_prefix, args.seed)
    padded = sum(row.tokens for row in pass_costs(examples, batch, None, False, args.seed))
    weight = {"float32": 4, "float64": 8}.get(str(dtype).removeprefix("torch."), 2)
    if zero:  # DeepSpeed trains in one type, without autocast
        weight, mixed = 2 if zero.half else 4, False
    optimizer = str(getattr(args.optim, "value", args.optim))
    states = next((n for start, n in STATES.items() if optimizer.startswith(start)), 2)
    has_several_passes = len(rows) > -(-len(examples) // batch)
    return Job(
        sizes=sizes,
        rows=tuple(rows),
        padded_tokens=padded,
        pairs=len(examples),
        pairs_trained=max(1, steps * batch * args.gradient_accumulation_steps // stands_for),
        stands_for=stands_for,
        weight=weight,
        compute=2 if mixed else weight,
        states=states,
        checkpointing=checkpointing,
        accumulates=args.gradient_accumulation_steps > 1 or has_several_passes,
        copies=reference == "online" and not sizes.adapter,
        reference=reference,
        on_gpu=on_gpu,
        mismatched=mismatched,
        processes=processes,
        sharded=sharded,
        quantized=quantized,
        mixed=mixed,
        zero=zero,
        packed=args.shared_prefix,
        pack_tokens=pack_tokens,
    )
