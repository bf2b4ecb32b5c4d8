"""Loading what a recipe names: tokenizer, model, adapter. Safetensors only; no code of theirs unless it says so."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, one_line
from clair.inference.model_folder import adapter_base, check_remote_code, resize_vocabulary, weights_identity

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NF4_BLOCK = 64
"""Weights that share a constant in NF4."""


@dataclass(frozen=True)
class ModelName:
    """A model as the recipe names it: a folder or a hub name, with its base where it is an adapter."""

    path: str
    base: str
    trust_remote_code: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a LoRA adapter rather than a whole model."""
        return self.base != self.path


def find_model(path: str, trust_remote_code: bool = False) -> ModelName:
    """Look at what lies at `path`. Raises UserError for a folder that is not there or holds no model."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_file() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"model folder {path} does not exist; give a folder with config.json, or a hub name")
        return ModelName(path, path, trust_remote_code)
    if (folder / ADAPTER_CONFIG).is_file():
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"adapter {path} has no {ADAPTER_WEIGHTS}; only safetensors are read")
        return ModelName(str(folder), find_model(str(adapter_base(folder))).path, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {path} has no config.json; give a folder written by save_pretrained")
    if not trust_remote_code:
        check_remote_code(folder, "model")
    return ModelName(str(folder), str(folder), trust_remote_code)


def hash_model_files(name: ModelName) -> str:
    """SHA-256 of a model's files: weights, configs, tokenizer, of an adapter and of its base. Reads them all.

    Of a hub name those of the copy in the hub's cache.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name.path).is_dir():
        return weights_identity(name.path)
    cached = try_to_load_from_cache(name.path, "config.json")
    return weights_identity(Path(cached).parent) if isinstance(cached, str) else f"hub:{name.path}"


def load_tokenizer(name: ModelName, revision: str | None = None, for_chats: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError where it has no end of sequence or, `for_chats`, no chat template."""
    from transformers import AutoTokenizer

    own = (Path(name.path) / "tokenizer_config.json").is_file()
    where = name.path if own or not name.is_adapter else name.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, trust_remote_code=name.trust_remote_code, **({} if revision is None else {"revision": revision})
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"model {where}: no tokenizer can be loaded: {one_line(error)}") from error
    if for_chats and not tokenizer.chat_template:
        raise UserError(f"model {where} has no chat template; add chat_template.jinja, or train an instruct model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {where} has no eos_token, so an answer could not end; set the end of turn")
    return tokenizer


def load_generation_config(name: ModelName) -> GenerationConfig | None:
    """How the model generates, or None where it does not say. Read without the weights."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name.base)
    except OSError:
        return None


def context_length(name: ModelName) -> int | None:
    """How many tokens the model takes, or None where its config does not say. Read without the weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name.base, trust_remote_code=name.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(name: ModelName, **options: Any) -> PreTrainedModel | Any:
    """The model in float32 unless `dtype` says otherwise; an adapter comes on its base, ready to be trained on.

    Raises UserError where there are no safetensors, or the weights do not fit the config.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = options.pop("dtype", "float32")
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    options = {"use_safetensors": True, "trust_remote_code": name.trust_remote_code, **options}
    reading = _unmapped() if "quantization_config" in options else contextlib.nullcontext()
    try:
        with reading:
            model = AutoModelForCausalLM.from_pretrained(name.base, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, MemoryError, SafetensorError) as error:
        raise UserError(f"model {name.base} cannot be loaded: {one_line(error)}") from error
    _fix_4bit_on_cpu(model)
    if not name.is_adapter:
        return model
    from peft import PeftModel

    try:
        resize_vocabulary(model, Path(name.path) / ADAPTER_WEIGHTS)
        return PeftModel.from_pretrained(model, name.path, is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"adapter {name.path} does not fit {name.base}: {one_line(error)}") from error


def quantization_problem() -> str | None:
    """Why a model cannot be loaded in 4 bits here, or None."""
    if find_spec("bitsandbytes") is None:
        return "quantize: nf4 needs bitsandbytes, which is not installed: pip install 'clair-apo[quantize]'"
    return None


def nf4_config(compute: str) -> BitsAndBytesConfig:
    """NF4 with its constants quantised again (QLoRA, arXiv 2305.14314), and products in the type `compute`.

    PEFT's prepare_model_for_kbit_training is not called, as TRL does not: it would put embeddings and head into
    float32, and what else it does, freezing and gradients for checkpointing, PEFT and TRL do.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


@contextlib.contextmanager
def _unmapped() -> Iterator[None]:
    """Models that are loaded meanwhile are read from their files, as transformers does on Windows, and not mapped.

    On a CPU the weights that are not quantised would stay views into the mapped file, and with them in memory what of
    it was read to quantise the others. On a GPU nothing is kept of either.
    """
    from transformers import modeling_utils

    mapped = modeling_utils.safe_open

    @functools.wraps(mapped)
    def read(*args: Any, **more: Any) -> Any:
        return mapped(*args, **more | {"backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def _fix_4bit_on_cpu(model: PreTrainedModel) -> None:
    """Make 4-bit weights on a CPU compute what they hold.

    On processors with AVX512-BF16 bitsandbytes (0.50) lays them out anew when they are first asked without a gradient,
    and multiplies in bfloat16 and without a backward from then on: after one look at the reference an adapter would be
    trained on wrong gradients. So the layout is kept. Rows that are no whole number of blocks it reads back wrongly:
    raises UserError for these.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.weight.device.type == "cpu" and module.in_features % NF4_BLOCK:
            raise UserError(
                f"quantize: {name} has rows of {module.in_features} weights, and on a CPU bitsandbytes reads back "
                f"wrong numbers where they are no multiple of {NF4_BLOCK}; start it on a GPU, or leave quantize out"
            )


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raises UserError where the tokenizer has ids that the model has no embedding for."""
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(f"model {path} has {rows:,} embeddings but its tokenizer has ids up to {highest:,}")
