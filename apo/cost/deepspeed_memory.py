"""Memory of one process under DeepSpeed's ZeRO, computed from its config as DeepSpeed 0.19 allocates it.

Stage 1 shards the optimizer's states, stage 2 also the gradients, stage 3 also the weights. The optimizer works on a
sharded float32 copy of the weights; stages 1 and 2 make the copy even if the weights are in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apo.cost.sizes import ModelSizes

_BUCKET, _LIVE, _PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of reduce_bucket_size, stage3_max_live_parameters and stage3_prefetch_bucket_size."""
_UNSUPPORTED = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "mics_shard_size",
    "zenflow",
)


@dataclass(frozen=True)
class ZeroConfig:
    """The settings of a DeepSpeed config that determine memory.

    bucket     numbers in a bucket of gradients, of which there are `buckets`
    live       weights that stage 3 holds unsharded at once
    prefetch   weights that stage 3 fetches in advance
    half       True if weights, gradients and adapter take 2 bytes per number, else 4
    offload    True if the optimizer, its copy of the weights and its gradients are in the CPU's memory
    """

    stage: int
    bucket: int = _BUCKET
    buckets: int = 1
    live: int = _LIVE
    prefetch: int = _PREFETCH
    half: bool = False
    offload: bool = False


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes of one process: weights, optimizer, and gradients at the beginning and at the end of backward."""

    weights: float
    optimizer: float
    begin: float
    end: float


def parse_zero_config(config: Mapping[str, Any], hidden: int) -> ZeroConfig | None:
    """Return a DeepSpeed config's settings, or None if it shards nothing. The bucket size `auto` is `hidden` squared.

    Raises ValueError, with the key, for a setting that the formulas do not describe.
    """
    section = config.get("zero_optimization") or {}
    stage = int(section.get("stage") or 0)
    if stage == 0:
        return None
    optimizer, weights = section.get("offload_optimizer") or {}, section.get("offload_param") or {}
    unsupported = [
        key for key in _UNSUPPORTED if section.get(key) is True or section.get(key) not in (None, False, 1, -1)
    ]
    unsupported += ["offload_optimizer to nvme"] if optimizer.get("device") == "nvme" else []
    unsupported += ["offload_param"] if weights.get("device") not in (None, "none") else []
    unsupported += ["offload_optimizer.ratio"] if optimizer.get("ratio", 1) != 1 else []
    if (config.get("data_types") or {}).get("grad_accum_dtype"):
        unsupported.append("data_types.grad_accum_dtype")
    if unsupported:
        raise ValueError(f"the formulas do not describe DeepSpeed's {unsupported[0]}")
    bucket, live = section.get("reduce_bucket_size", _BUCKET), section.get("stage3_max_live_parameters", _LIVE)
    prefetch = section.get("stage3_prefetch_bucket_size", _PREFETCH)
    return ZeroConfig(
        stage,
        bucket=hidden**2 if bucket == "auto" else int(bucket),
        buckets=2 if stage < 3 and section.get("overlap_comm") else 1,
        live=_LIVE if live == "auto" else int(live),
        prefetch=int(0.9 * hidden**2) if prefetch == "auto" else int(prefetch),
        half=any((config.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16")),
        offload=optimizer.get("device") == "cpu",
    )


def zero_memory(
    sizes: ModelSizes, zero: ZeroConfig, states: int, processes: int, *, on_gpu: bool, accumulates: bool
) -> ZeroMemory:
    """Return the bytes of one of several processes.

    weights    all; at stage 3 the process's shard, and at most `live` gathered weights
    optimizer  its shard of the states, and of the float32 copy if there is one
    begin      the gradients of earlier passes (its shard; all at stage 1), and a GPU's buckets, allocated in full;
               at stage 3 also the weights fetched in advance
    end        these gradients, the filled part of the bucket, and a copy of it to send; at stage 3 also its shard in
               float32, and on a CPU a further copy, which gloo makes
    """
    width, parameters = 2 if zero.half else 4, sizes.parameters + sizes.adapter  # bytes of a number
    shard, gradients = sizes.trained / processes, width * sizes.trained / (1 if zero.stage == 1 else processes)
    weights, optimizer = width * parameters, 4 * shard * (states + (zero.half or zero.stage < 3))
    if zero.stage == 3:
        weights = weights / processes + width * min(parameters, zero.live)
    filled = width * min(zero.bucket, sizes.trained)
    bucket, sent = (zero.buckets * width * zero.bucket, filled) if on_gpu else (filled, filled)
    if zero.offload and on_gpu:
        optimizer, gradients, shard = 0, 0 if zero.stage > 1 else gradients, 0
    if zero.stage == 3:  # the buffers for its shard and for the bucket exist from the start
        sent += 4 * shard + (0 if on_gpu else filled)
        fetched = width * min(zero.prefetch, parameters)
        return ZeroMemory(weights, optimizer, gradients + bucket + fetched, gradients + bucket + sent)
    return ZeroMemory(weights, optimizer, gradients * accumulates + bucket * on_gpu, gradients + bucket + sent)
