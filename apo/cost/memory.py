"""Whether a run fits, what it computes and how long that takes: from the config and the pairs, before any weight.

FLOPs and bytes are formulas in the docstrings below, for decoders of the Llama kind in packed rows (prefix.py) or in
TRL's padded batch. What they are fed with is counted in shapes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from apo.cost.deepspeed_memory import Zero, held
from apo.cost.sizes import GIB, Device, Row, Sizes, rows_of
from apo.packing.head import HEAD_CHUNK, stores_logits
from clair.core.errors import UserError
from clair.core.progress import duration

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_AT = 2048
"""Pairs whose lengths are looked at; of a longer dataset every n-th."""
STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}
"""Numbers an optimizer keeps per trained parameter, by the beginning of its name; others are taken for AdamW."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: 4 bits, a constant of 8 bits for 64 weights, one of 32 bits for 256 constants."""
TRL_TILE, TRL_SLOPE = (4096, 32_768), 29
"""Positions and vocabulary of a tile of TRL 1.16's head, and bytes a logit's slope takes on its way on a CPU: seven
numbers in float32 and a flag."""
HOLES = 2
"""MEASURED, not derived: layers' activations that glibc's allocator keeps in holes on a CPU (test_memory.py)."""
ADAPTER_HOLES = (4, 0.8)
"""MEASURED, with an adapter, whose results are freed between what is kept: so many layers' activations, or this share
of all that is kept, whichever is more. Without holes, the formulas were 0.94 to 0.97 of five measured peaks."""


@dataclass(frozen=True)
class Job:
    """A run as far as its costs go. Bytes: `weight` of a stored number, `compute` of one in a matrix product.

    `rows`, `pairs`, `seen` (in training) and `padded_tokens` (of TRL's batch, an epoch) are of the pairs looked at,
    each of which `stands_for` so many. `mismatched`: each is also run with its neighbour's response, for KTO's kl.
    `quantized`: linear layers below an adapter are in NF4. `mixed`: under autocast. Not `packed`: TRL's batch.
    Of several `processes` all costs are those of one; `sharded` ones share weights, gradients and states (FSDP2), those
    with a `zero` what it says.
    """

    sizes: Sizes
    rows: tuple[Row, ...]
    padded_tokens: int
    pairs: int
    seen: int
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
    zero: Zero | None = None
    packed: bool = True

    @property
    def trained_weight(self) -> int:
        """Bytes of a trained parameter, its gradient and each of its optimizer's states; an adapter is in float32."""
        return 4 if self.is_adapter else self.weight

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter is trained."""
        return self.sizes.adapter > 0


# ---- the costs


def forward_flops(sizes: Sizes, row: Row) -> float:
    """2 x linear weights x tokens + 4 x layers x head width x query-key products + 2 x hidden x vocabulary x labels."""
    return _body_flops(sizes, row) + 2 * sizes.hidden * sizes.vocabulary * row.labels


def _body_flops(sizes: Sizes, row: Row) -> float:
    return 2 * (sizes.linear + sizes.adapter) * row.tokens + 4 * sizes.layers * sizes.heads * row.products


def step_flops(job: Job, row: Row) -> float:
    """Forward and backward of one row.

    Backward: twice the forward of each trained matrix, once that of a frozen one (no gradient of the weight), attention
    2.5 times (its scores are made anew), the head once (twice where it is trained) and once more where its logits are
    made anew. With activation checkpointing the body's forward once more.
    """
    sizes = job.sizes
    attention = 4 * sizes.layers * sizes.heads * row.products
    matrices = sizes.linear * (1 if job.is_adapter else 2) + 2 * sizes.adapter
    times = (1 if job.is_adapter else 2) + (not (job.packed and stores_logits(row.labels, sizes.vocabulary)))
    head = 2 * sizes.hidden * sizes.vocabulary * row.labels * times
    again = _body_flops(sizes, row) if job.checkpointing else 0
    return forward_flops(sizes, row) + 2 * matrices * row.tokens + 2.5 * attention + head + again


def run_flops(job: Job) -> tuple[float, float]:
    """FLOPs of a process and, of these, the reference's: one forward per pair if cached, per pair seen if online.

    A cached reference is shared out over the processes. Mismatched responses are one more forward of each per pair
    seen.
    """
    epochs = job.seen / job.pairs
    forward = sum(forward_flops(job.sizes, row) for row in job.rows) * job.stands_for
    mismatched = epochs * forward if job.mismatched else 0
    reference = {"cached": 1 / job.processes, "online": epochs}.get(job.reference or "", 0) * forward + mismatched
    steps = epochs * job.stands_for * sum(step_flops(job, row) for row in job.rows)
    return steps + mismatched + reference, reference


def memory_of(job: Job) -> dict[str, float]:
    """Bytes at the peak: what lies there all the time, and the larger of two moments.

    weights      parameters x bytes, twice with a copy for the reference; in mixed precision also the 2-byte copies
    optimizer    states x trained parameters x bytes
    activations  `row_bytes` of the largest row
    At the start of backward: activations, the head's buffers and, where gradients accumulate, all gradients.
    At its end: all gradients and one layer's activations.
    On a CPU, `HOLES` more; a GPU's allocator is taken to waste nothing. A file of numbers of another
    type lies there beside the weights made of it while it is read.
    Sharded, a process stores its part of weights, gradients and states, and `_gathered_bytes` come and go in the type
    of the matrix products. Before, it holds the whole model, for the reference: counted where that is the peak.
    DDP's buckets are a second copy of the gradients. Under ZeRO all this is as shares.py says.
    """
    sizes, shares = job.sizes, job.processes if job.sharded else 1
    stored = sizes.parameters * job.weight * (2 if job.copies else 1) + sizes.adapter * job.trained_weight
    cast = sizes.linear * job.compute if job.compute < job.weight else 0
    if job.quantized:  # one matrix at a time is put back into the type of the products
        stored, cast = stored - sizes.linear * (job.weight - NF4), sizes.hidden * sizes.inner * job.compute
    weights = stored / shares + (_gathered_bytes(job) if shares > 1 else cast)
    optimizer = job.states * sizes.trained * job.trained_weight / shares
    gradients = sizes.trained * job.trained_weight / shares
    early = gradients if job.accumulates else 0
    if job.zero:
        zero = held(sizes, job.zero, job.states, job.processes, on_gpu=job.on_gpu, accumulates=job.accumulates)
        weights, optimizer, early, gradients = zero.weights, zero.optimizer, zero.begin, zero.end
    activations = max(row_bytes(job, row) for row in job.rows)
    head = max(_head_bytes(job, row) for row in job.rows)
    working = max(_working_bytes(job, row) for row in job.rows)
    start, end = activations + max(head, working), working + activations / sizes.layers
    ends = early + start < gradients + end
    moment = {"gradients": gradients if ends else early, "activations": end if ends else start}
    holes = 0 if job.on_gpu else max(_hole_bytes(job, row) for row in job.rows)
    found = {"weights": weights, "optimizer": optimizer, **moment, "allocator": holes}
    if not (job.on_gpu or job.quantized or job.zero) and sizes.stored not in (None, job.weight):
        read = sizes.parameters * (sizes.stored + job.weight)
        found["file while it is read"] = max(0, read - sum(found.values()))
    if shares > 1:
        return found | {"whole model before it is sharded": max(0, stored + cast - sum(found.values()))}
    if job.zero and job.zero.stage == 3:
        whole = (sizes.parameters + sizes.adapter) * (2 if job.zero.half else 4)
        return found | {"whole model before it is sharded": max(0, whole - sum(found.values()))}
    return found | ({"buckets": gradients} if job.processes > 1 and not job.zero else {})


def _gathered_bytes(job: Job) -> float:
    """What FSDP2 puts together for a moment: two layers (one ahead), and embeddings, head and last norm throughout; as
    much again of gradients, where these are trained."""
    sizes = job.sizes
    together = sizes.parameters - sizes.linear + 2 * sizes.linear / sizes.layers
    return together * job.compute * (1 if job.is_adapter else 2)


def row_bytes(job: Job, row: Row) -> float:
    """What forward keeps for backward, in bytes, of all layers; with checkpointing each layer's input and one layer.

    Per token and layer, h hidden, a = heads x head width, i inner: both norms keep their input in float32 and (where
    their weight is trained) the normed input in the type of the weights: h (4 + w) each. Attention keeps queries, keys
    and values (repeated to all heads) and its output: 4 a c. The gated MLP keeps 3 i c. Matrices keep what they read:
    (2 h + a + i) c; where that is brought into another type, each its own, as queries, keys and values read the same:
    (5 h + a + i) c under autocast, and 4 bytes for c where the adapter is in float32 and the weights are not. Rejected
    branches keep their own keys and values, 2 a c each, and a float mask, c per query-key product.
    """
    layer = _layer_bytes(job, row)
    if job.checkpointing:
        residual = max(job.weight, job.compute)
        return job.sizes.layers * row.tokens * job.sizes.hidden * residual + layer
    return job.sizes.layers * layer


def _layer_bytes(job: Job, row: Row) -> float:
    sizes, c = job.sizes, job.compute
    norms = 2 * sizes.hidden * (4 + (0 if job.is_adapter else job.weight))
    brought = job.mixed or (job.is_adapter and c < 4 and not job.zero)  # DeepSpeed rounds the adapter too
    read = ((5 if brought else 2) * sizes.hidden + sizes.heads + sizes.inner) * (c if job.mixed or not brought else 4)
    gated = 3 * sizes.inner * (job.weight if job.quantized else c)  # bitsandbytes gives back the type it was given
    return (norms + read + 4 * sizes.heads * c + gated) * row.tokens + 2 * sizes.heads * c * row.keys + c * row.masked


def _hole_bytes(job: Job, row: Row) -> float:
    layers, share = ADAPTER_HOLES if job.is_adapter else (HOLES, 0)
    return max(layers * _layer_bytes(job, row), share * row_bytes(job, row))


def _head_bytes(job: Job, row: Row) -> float:
    """The head's buffers in backward: logits in float32, kept of all labels or made of a chunk, hidden states and their
    gradient; below float32 also the chunk rounded.

    Where the head is trained, also its gradient in float32, and of several chunks one product on its way into it.
    In TRL's padded batch a tile of logits, on a CPU with what its slope is made of, and both gradients in float32.
    """
    sizes = job.sizes
    if not job.packed:
        tile = min(row.labels, TRL_TILE[0]) * min(sizes.vocabulary, TRL_TILE[1])
        gradients = 4 * sizes.hidden * (row.labels + (0 if job.is_adapter else sizes.vocabulary))
        return tile * (job.compute + (0 if job.on_gpu else TRL_SLOPE)) + gradients
    chunk, rounded = min(row.labels, HEAD_CHUNK), job.compute if job.compute < 4 else 0
    logits = 4 * (row.labels if stores_logits(row.labels, sizes.vocabulary) else chunk) + rounded * chunk
    coming = job.compute if row.labels > HEAD_CHUNK else rounded
    trained = 0 if job.is_adapter else (4 + coming) * sizes.hidden
    return sizes.vocabulary * (logits + trained) + 2 * row.labels * sizes.hidden * job.compute


def _working_bytes(job: Job, row: Row) -> float:
    """Gradients on their way through one gated MLP: 3 i + 2 h per token."""
    return row.tokens * (3 * job.sizes.inner + 2 * job.sizes.hidden) * job.compute


# ---- the run


def job_of(
    sizes: Sizes,
    dataset: Dataset,
    args: Any,
    steps: int,
    *,
    reference: str | None,
    dtype: str = "float32",
    mixed: bool = False,
    checkpointing: bool = False,
    on_gpu: bool = False,
    mismatched: bool = False,
    processes: int = 1,
    sharded: bool = False,
    quantized: bool = False,
    zero: Zero | None = None,
) -> Job:
    """What the trainer's options and the tokenised pairs come to. `reference` is "cached", "online" or None."""
    apart = -(-len(dataset) // LOOKED_AT)
    examples = [dataset[row] for row in range(0, len(dataset), apart)]
    batch = args.per_device_train_batch_size
    rows = rows_of(examples, batch, args.pack_tokens, args.shared_prefix, args.seed)
    padded = sum(row.tokens for row in rows_of(examples, batch, None, False, args.seed))
    weight = {"float32": 4, "float64": 8}.get(str(dtype).removeprefix("torch."), 2)
    if zero:  # which trains in one type, without autocast
        weight, mixed = 2 if zero.half else 4, False
    optimizer = str(getattr(args.optim, "value", args.optim))
    states = next((n for start, n in STATES.items() if optimizer.startswith(start)), 2)
    cut_up = len(rows) > -(-len(examples) // batch)
    return Job(
        sizes, tuple(rows), padded, len(examples), max(1, steps * batch * args.gradient_accumulation_steps // apart),
        apart, weight, 2 if mixed else weight, states, checkpointing=checkpointing, reference=reference,
        accumulates=args.gradient_accumulation_steps > 1 or cut_up,
        copies=reference == "online" and not sizes.adapter, on_gpu=on_gpu, mismatched=mismatched,
        processes=processes, sharded=sharded, quantized=quantized, mixed=mixed,
        zero=zero, packed=args.shared_prefix,
    )  # fmt: skip


def needed(job: Job, device: Device) -> float:
    """Bytes at the peak on a device."""
    return sum(memory_of(job).values()) + device.reserved


def tokens_told(job: Job) -> str:
    """How many tokens an epoch runs, in words, and what share that is of TRL's padded batch."""
    tokens = sum(row.tokens for row in job.rows)
    count, share = tokens * job.stands_for, tokens / job.padded_tokens
    about = "about " if job.stands_for > 1 else ""
    return f"{about}{count:,} an epoch, {share:.0%} of the {job.padded_tokens * job.stands_for:,} of TRL's padded batch"


def table(jobs: dict[bool, Job], devices: Sequence[Device]) -> list[str]:
    """A line per device: memory, whether it fits, time. `jobs` are those on a GPU (True) and on a CPU (False).

    Memory is the sum of the parts as they are shown.
    """
    lines = []
    for device in devices:
        job = jobs[device.is_gpu]
        memory = needed(job, device)
        fits = "fits" if memory <= device.memory else "does NOT fit"
        sizes = {**memory_of(job), "libraries": device.reserved}
        shown = {name: round(size / GIB, 2) for name, size in sizes.items() if round(size / GIB, 2)}
        parts = ", ".join(f"{name} {size:.2f}" for name, size in shown.items())
        spent = f"about {duration(run_flops(job)[0] / device.flops)}" if memory <= device.memory else "-"
        lines.append(
            f"{device.name}: {_gib(sum(shown.values()) * GIB)} of {_gib(device.memory)} GiB, {fits}, {spent} ({parts})"
        )
    return lines


def check_fits(job: Job, device: Device) -> None:
    """Raises UserError where the peak is more than the device has, and says which change would make it fit."""
    if needed(job, device) <= device.memory:
        return
    smallest = replace(job, rows=(min(job.rows, key=lambda row: row.tokens),))
    tries = {
        "trainer.pack_tokens (a row of a few thousand tokens at most)": smallest,
        "trainer.gradient_checkpointing: true": replace(job, checkpointing=True),
        "reference: cached": replace(job, copies=False),
        "trainer.fsdp: true": replace(job, sharded=job.processes > 1 and not job.zero),
        "lora: {r: 16}": replace(job, copies=False, sizes=replace(job.sizes, adapter=max(1, job.sizes.linear // 200))),
        "trainer.model_init_kwargs: {dtype: bfloat16}": replace(job, weight=2, compute=2),
    }
    helps = [name for name, other in tries.items() if needed(other, device) < 0.97 * needed(job, device)]
    enough = [name for name in helps if needed(tries[name], device) <= device.memory]
    change = " or ".join(enough) if enough else f"several of {', '.join(helps)}; or take a smaller model"
    raise UserError(
        f"the run needs about {_gib(needed(job, device))} GiB and {device.name} has {_gib(device.memory)}; set {change}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.1 * GIB else f"{size / GIB:.2f}"
