"""The arguments of `APOTrainer`, checked and resolved before TRL sees them: a named model, streams, the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from transformers.trainer_utils import set_seed

from apo.distributed.deepspeed import unsharded_loading
from apo.models.load import find_model, load_model, load_tokenizer
from apo.training.reference import NO_CACHE_FOR_STREAMS
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError


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


def check_text_only(dataset: Any, *, packed: bool) -> None:
    """Raises UserError for a dataset of images, which packed rows cannot hold."""
    if packed and (images := {"image", "images"} & set(getattr(dataset, "column_names", None) or ())):
        raise UserError(
            f"the train dataset has a column {min(images)!r}, and packed rows hold text only; set shared_prefix=False, "
            "which trains it in TRL's batch"
        )


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


def can_copy_reference(model: Any, args: APOConfig, peft_config: Any) -> bool:
    """True if the reference can be a copy of the model in memory; otherwise TRL loads the model's folder again."""
    if peft_config is not None or is_peft_model(model):
        return False
    return not (args.fsdp or getattr(model, "hf_device_map", None))
