"""The arguments of `APOTrainer`: checked and resolved before TRL sees them, and notes on those without effect."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import set_seed

from apo.data.tokenize import first_row
from apo.distributed.deepspeed import check_zero3_saves, unsharded_loading
from apo.distributed.launch import check_devices, fsdp_requested
from apo.losses.mixture import Mixture
from apo.models.load import find_model, load_model, load_tokenizer
from apo.monitoring.metrics import check_best_metric
from apo.training.reference import NO_CACHE_FOR_STREAMS
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError

_SAMPLE = 65_536
"""Numbers of a weight that are sampled to estimate how many of them a step changes."""


def default_output_dir(model: Any) -> str:
    """`NAME-APO`, with the name of the model or of its folder, or the one that its config was loaded from."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{Path(name or 'model').name}-APO"


def load_named_model(path: str, args: APOConfig, options: dict[str, Any]) -> torch.nn.Module:
    """Load the model at `path`, and its tokenizer into `options`, those of the trainer, unless they name one.

    Takes `quantization_config` out of the trainer's options. Seeded, because weights that the file lacks are random.
    Raises UserError for a `quantization_config` in two places, and as `load_model` does.
    """
    loading = args.loading_options()
    quantization = options.pop("quantization_config", None)
    if quantization is not None:
        if "quantization_config" in loading:
            raise UserError("quantization_config is set twice, also in args.model_init_kwargs; leave one out")
        loading["quantization_config"] = quantization
    name = find_model(path, loading.pop("trust_remote_code", args.trust_remote_code))
    set_seed(args.seed)
    with unsharded_loading():
        model = load_model(name, **loading)
    if options.get("processing_class") is None:
        options["processing_class"] = load_tokenizer(name, revision=loading.get("revision"), for_chats=False)
    return model


def check_arguments(args: APOConfig, objective: Mixture, dataset: Any, eval_dataset: Any, *, packed: bool) -> None:
    """Raises UserError for arguments of the trainer that cannot work; `dataset` is the one to train on.

    `packed` is true if packed rows may be used; they cannot hold images.
    """
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else ()
    check_best_metric(args.metric_for_best_model, objective, sets)
    if packed and (images := {"image", "images"} & set(getattr(dataset, "column_names", None) or ())):
        raise UserError(
            f"the train dataset has a column {min(images)!r}, and packed rows hold text only; set shared_prefix=False, "
            "which trains it in TRL's batch"
        )
    accelerator_config: Any = args.accelerator_config
    if accelerator_config.dispatch_batches:
        raise UserError("accelerator_config.dispatch_batches would be ignored: each process reads its pairs itself")
    accelerator_config.dispatch_batches = False  # None would be True for a stream, whose batches accelerate would cut
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if objective.needs_divergence and window < 2:
        raise UserError(
            f"objective {objective.name} compares each prompt with another one's answers: "
            "per_device_train_batch_size x gradient_accumulation_steps x processes must be at least 2"
        )
    check_devices(args)
    check_zero3_saves(args)
    check_streams(args, dataset, eval_dataset)
    if isinstance(dataset, Dataset | IterableDataset):
        first_row(dataset, "train")


def check_streams(args: APOConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Raises UserError for an IterableDataset if all rows must be known before the first step."""
    held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if not any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *held_out)):
        return
    if args.precompute_ref_log_probs:
        raise UserError(NO_CACHE_FOR_STREAMS)
    if args.world_size > 1:
        raise UserError(
            f"an IterableDataset cannot be divided exactly among {args.world_size} processes, because its length is "
            "unknown: train it on one, or make a datasets.Dataset of it (Dataset.from_generator keeps it on disk)"
        )


def resolve_reference(
    model: Any, ref_model: Any, args: APOConfig, objective: Mixture, has_adapter: bool
) -> tuple[Any, bool]:
    """The reference: `ref_model`, a frozen copy of the model, or None; and whether TRL loads it from the model's name.

    None is right for an adapter, for cached log-probs, and for an objective without a reference. TRL loads a model
    that is divided among devices again. Raises UserError for a reference that FSDP would not shard.
    """
    # The cache serves the pairs; KTO's divergence also runs the reference, on rotated pairs, at each step.
    is_run = objective.needs_reference and (not args.precompute_ref_log_probs or objective.needs_divergence)
    if not is_run or has_adapter:
        return ref_model, False
    if fsdp_requested(args):
        raise UserError(
            "under FSDP the reference of full fine-tuning would be a second model, whole in every process; set "
            "reference: cached (precompute_ref_log_probs), or train an adapter"
        )
    if ref_model is not None:
        return ref_model, False
    if getattr(model, "hf_device_map", None):
        return None, True
    return copy.deepcopy(model).eval().requires_grad_(False), False


def ineffective_options(args: APOConfig, *, packed: bool) -> list[str]:
    """Notes on options of TRL's batch that have no effect on packed rows."""
    reasons = {"pad_to_multiple_of": "they are not padded"} if packed else {}
    if packed and args.pack_tokens is not None and args.precompute_ref_log_probs:
        reasons["precompute_ref_batch_size"] = "the reference runs on rows of pack_tokens"
    return [
        f"{name} has no effect on packed rows: {reason}; shared_prefix: false brings TRL's batch"
        for name, reason in reasons.items()
        if getattr(args, name) is not None
    ]


def rounding_notes(model: torch.nn.Module, rate: float) -> list[str]:
    """A note if a step of the learning rate would not change most trained weights, in half precision."""
    total, changed = 0, 0
    half = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype.itemsize == 2]
    for weight in half if rate else ():
        sample = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLE)]
        total += weight.numel()
        changed += (sample + rate != sample).float().mean().item() * weight.numel()
    if not total or changed > total / 2:
        return []
    return [
        f"a step of the learning rate, {rate:g}, changes {changed / total:.2%} of the trained weights: they are in "
        f"{str(half[0].dtype).removeprefix('torch.')}, and the other updates are rounded away; train them in "
        "float32 (model_init_kwargs: {dtype: float32}; bf16: true still computes in bfloat16), or an adapter"
    ]
