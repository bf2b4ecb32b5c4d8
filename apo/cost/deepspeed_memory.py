"""What each of several processes holds under DeepSpeed's ZeRO, from its config, as the code of DeepSpeed 0.19 does it.

Stage 1 shares out the optimizer's states, 2 also the gradients, 3 also the weights. The optimizer works on a copy of
the weights in float32, shared out, which stages 1 and 2 make also of weights in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apo.cost.sizes import Sizes

_BUCKET, _LIVE, _AHEAD = 500_000_000, 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of reduce_bucket_size, stage3_max_live_parameters and stage3_prefetch_bucket_size."""
_UNKNOWN = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "mics_shard_size",
    "zenflow",
)


@dataclass(frozen=True)
class Zero:
    """A DeepSpeed config as far as memory goes. `half`: weights, gradients and adapter are in 2 bytes, else in 4.

    `bucket` is how many numbers a bucket of gradients takes; `live` how many weights stage 3 keeps whole at once, and
    `ahead` how many it fetches ahead.
    `offload`: the optimizer, its copy of the weights and its gradients lie in the memory of the CPU.
    """

    stage: int
    bucket: int = _BUCKET
    buckets: int = 1
    live: int = _LIVE
    ahead: int = _AHEAD
    half: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes of one process: weights and optimizer all the time, gradients when backward begins and when it ends."""

    weights: float
    optimizer: float
    begin: float
    end: float


def zero_of(config: Mapping[str, Any], hidden: int) -> Zero | None:
    """What a DeepSpeed config asks for, None where it shares nothing out. A bucket `auto` is `hidden` squared.

    Raises ValueError, with its name, for what the formulas do not describe.
    """
    asked = config.get("zero_optimization") or {}
    stage = int(asked.get("stage") or 0)
    if stage == 0:
        return None
    optimizer, weights = asked.get("offload_optimizer") or {}, asked.get("offload_param") or {}
    unknown = [key for key in _UNKNOWN if asked.get(key) is True or asked.get(key) not in (None, False, 1, -1)]
    unknown += ["offload_optimizer to nvme"] if optimizer.get("device") == "nvme" else []
    unknown += ["offload_param"] if weights.get("device") not in (None, "none") else []
    unknown += ["offload_optimizer.ratio"] if optimizer.get("ratio", 1) != 1 else []
    unknown += ["data_types.grad_accum_dtype"] if (config.get("data_types") or {}).get("grad_accum_dtype") else []
    if unknown:
        raise ValueError(f"the formulas do not describe DeepSpeed's {unknown[0]}")
    bucket, live = asked.get("reduce_bucket_size", _BUCKET), asked.get("stage3_max_live_parameters", _LIVE)
    ahead = asked.get("stage3_prefetch_bucket_size", _AHEAD)
    return Zero(
        stage,
        bucket=hidden**2 if bucket == "auto" else int(bucket),
        buckets=2 if stage < 3 and asked.get("overlap_comm") else 1,
        live=_LIVE if live == "auto" else int(live),
        ahead=int(0.9 * hidden**2) if ahead == "auto" else int(ahead),
        half=any((config.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16")),
        offload=optimizer.get("device") == "cpu",
    )


def held(sizes: Sizes, zero: Zero, states: int, processes: int, *, on_gpu: bool, accumulates: bool) -> Held:
    """The bytes of one of several processes.

    weights    all; at stage 3 its part, and at most `live` put together from all parts
    optimizer  its part of the states, and of the copy in float32 where there is one
    begin      the gradients of earlier passes (its part; all of them at stage 1), and a GPU's buckets, allocated whole;
               at stage 3 the parts of weights fetched ahead, which lie there until they are put together
    end        these gradients, the bucket as far as it is filled, and once more as it is sent; at stage 3 its part also
               in float32, and on a CPU a further copy, which gloo makes
    """
    number, whole = 2 if zero.half else 4, sizes.parameters + sizes.adapter
    part, own = sizes.trained / processes, number * sizes.trained / (1 if zero.stage == 1 else processes)
    weights, optimizer = number * whole, 4 * part * (states + (zero.half or zero.stage < 3))
    if zero.stage == 3:
        weights = weights / processes + number * min(whole, zero.live)
    filled = number * min(zero.bucket, sizes.trained)
    bucket, sent = (zero.buckets * number * zero.bucket, filled) if on_gpu else (filled, filled)
    if zero.offload and on_gpu:
        optimizer, own, part = 0, 0 if zero.stage > 1 else own, 0
    if zero.stage == 3:  # the buffers for its part and for the bucket are there from the start
        sent += 4 * part + (0 if on_gpu else filled)
        fetched = number * min(zero.ahead, whole)
        return Held(weights, optimizer, own + bucket + fetched, own + bucket + sent)
    return Held(weights, optimizer, own * accumulates + bucket * on_gpu, own + bucket + sent)
