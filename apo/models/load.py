"""Load the tokenizer, model and adapter that a recipe names: safetensors only, remote code only if it allows it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, one_line
from clair.inference.model_folder import (
    SOFT_PROMPT,
    adapter_base,
    check_remote_code,
    resize_vocabulary,
    weights_identity,
)

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from clair.inference.generation.soft_prompt import SoftPrompt

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NF4_BLOCK = 64
"""Number of weights that share a scale in NF4."""


@dataclass(frozen=True)
class ModelName:
    """A model as the recipe names it: a folder or a hub name, and the base if it is an adapter."""

    path: str
    base: str
    trust_remote_code: bool = False

    @property
    def is_adapter(self) -> bool:
        """True if the folder holds a LoRA adapter rather than a whole model."""
        return self.base != self.path


def find_model(path: str, trust_remote_code: bool = False, *, soft_prompt: bool = False) -> ModelName:
    """Resolve a folder or hub name. Raises UserError for a folder that does not exist or holds no model.

    Unless `soft_prompt`, also for one with a soft prompt, which would be left out.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_file() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"model folder {path} does not exist; give a folder with config.json, or a hub name")
        return ModelName(path, path, trust_remote_code)
    if not soft_prompt:
        refuse_soft_prompt(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"adapter {path} has no {ADAPTER_WEIGHTS}; only safetensors are read")
        return ModelName(str(folder), find_model(str(adapter_base(folder))).path, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {path} has no config.json; give a folder written by save_pretrained")
    if not trust_remote_code:
        check_remote_code(folder, "model")
    return ModelName(str(folder), str(folder), trust_remote_code)


def refuse_soft_prompt(folder: Path) -> None:
    """Raise UserError for a model whose soft prompt would be left out."""
    if (folder / SOFT_PROMPT).is_file():
        raise UserError(
            f"model {folder} has a soft prompt of its users ({SOFT_PROMPT}), which would be left out here; answer with "
            "it (apo.load_for_user, or `user` of a local model), or give the model that it was trained from"
        )


def hash_model_files(name: ModelName) -> str:
    """SHA-256 of a model's files: weights, configs and tokenizer, of an adapter and of its base. Reads them all.

    For a hub name, the files in the hub's cache.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name.path).is_dir():
        return weights_identity(name.path)
    cached = try_to_load_from_cache(name.path, "config.json")
    return weights_identity(Path(cached).parent) if isinstance(cached, str) else f"hub:{name.path}"


def load_tokenizer(name: ModelName, revision: str | None = None, for_chats: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError if it has no end of sequence or, `for_chats`, no chat template."""
    from transformers import AutoTokenizer

    has_tokenizer = (Path(name.path) / "tokenizer_config.json").is_file()
    source = name.path if has_tokenizer or not name.is_adapter else name.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=name.trust_remote_code, **({} if revision is None else {"revision": revision})
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"model {source}: no tokenizer can be loaded: {one_line(error)}") from error
    if for_chats and not tokenizer.chat_template:
        raise UserError(f"model {source} has no chat template; add chat_template.jinja, or train an instruct model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no eos_token, so an answer could not end; set the end of turn")
    return tokenizer


def load_generation_config(name: ModelName) -> GenerationConfig | None:
    """The model's generation config, or None. Does not load weights."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name.base)
    except OSError:
        return None


def context_length(name: ModelName) -> int | None:
    """The maximum number of tokens of a sequence, or None if the config has none. Does not load weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name.base, trust_remote_code=name.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(name: ModelName, **options: Any) -> PreTrainedModel | Any:
    """Load a model, by default in float32 (`dtype`); an adapter is loaded on its base, trainable.

    Raises UserError if there are no safetensors, or if the weights do not fit the config.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = options.pop("dtype", "float32")
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    options = {"use_safetensors": True, "trust_remote_code": name.trust_remote_code, **options}
    context = _no_memory_mapping() if "quantization_config" in options else contextlib.nullcontext()
    try:
        with context:
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


def load_for_user(
    folder: str | Path, user: str | Sequence[float], **options: Any
) -> tuple[PreTrainedModel | Any, PreTrainedTokenizerBase, SoftPrompt]:
    """Load a model that was trained with a soft prompt, to answer for one user.

    Args:
        folder: the run's folder: the whole model or the adapter, with soft_prompt.json beside it.
        user: the name of a user of the training pairs, or a user's state, such as a new user's latent.
        options: to `from_pretrained`, such as `dtype="bfloat16"`; by default float32.

    Returns the model in evaluation mode, its tokenizer and the soft prompt. `soft_prompt.mark(ids)` are the ids of a
    prompt for this user; of the prompt itself, the model answers as it does without a user.
    Raises UserError, in one line, for a folder without a soft prompt, an unknown user or a state of another width.
    """
    from clair.inference.generation.soft_prompt import SoftPrompt

    soft_prompt = SoftPrompt.load(Path(folder))
    state = soft_prompt.state_of(user)
    name = find_model(str(folder), soft_prompt=True)
    tokenizer, model = load_tokenizer(name), load_model(name, **options)
    soft_prompt.attach(model).states = state[None]
    return model.eval(), tokenizer, soft_prompt


def quantization_problem() -> str | None:
    """The reason why a model cannot be loaded in 4 bits here, or None."""
    if find_spec("bitsandbytes") is None:
        return "quantize: nf4 needs bitsandbytes, which is not installed: pip install 'clair-apo[quantize]'"
    return None


def nf4_config(compute: str) -> BitsAndBytesConfig:
    """NF4 with double quantization (QLoRA, arXiv 2305.14314), and products in the dtype `compute`.

    Like TRL, this does not use PEFT's prepare_model_for_kbit_training, which casts embeddings and head to float32. Its
    other effects, frozen weights and input gradients for checkpointing, come from PEFT and TRL.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


@contextlib.contextmanager
def _no_memory_mapping() -> Iterator[None]:
    """Read weight files instead of mapping them into memory in this context, as transformers does on Windows.

    On a CPU, weights that are not quantized would remain views into the mapped file, which would then keep the pages of
    the quantized weights in memory as well.
    """
    from transformers import modeling_utils

    module: Any = modeling_utils  # it does not export `safe_open`
    safe_open = module.safe_open

    @functools.wraps(safe_open)
    def read(*args: Any, **options: Any) -> Any:
        return safe_open(*args, **options | {"backend": "pread"})

    module.safe_open = read
    try:
        yield
    finally:
        module.safe_open = safe_open


def _fix_4bit_on_cpu(model: PreTrainedModel) -> None:
    """Work around errors of bitsandbytes (0.50) with 4-bit weights on a CPU.

    On processors with AVX512-BF16 it converts the weights to another layout at the first forward pass without gradient,
    and from then on multiplies in bfloat16 and without a backward pass: after one forward of the reference, an adapter
    would be trained on wrong gradients. So the conversion is disabled. Raises UserError for rows that are not a
    multiple of the block, which it dequantizes wrongly.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.weight.device.type == "cpu" and module.in_features % NF4_BLOCK:
            raise UserError(
                f"quantize: {name} has rows of {module.in_features} weights, and on a CPU bitsandbytes reads back "
                f"wrong numbers where they are no multiple of {NF4_BLOCK}; start it on a GPU, or leave quantize out"
            )


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raises UserError if the tokenizer has ids without an embedding in the model."""
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(f"model {path} has {rows:,} embeddings but its tokenizer has ids up to {highest:,}")
