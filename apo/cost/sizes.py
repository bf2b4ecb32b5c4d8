"""The inputs of a cost estimate: the model's sizes, the forward passes of the pairs, and the machine.

Parameters are counted on the meta device. Speeds are ASSUMPTIONS, marked as such where they are.
"""

from __future__ import annotations

import operator
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.distributed.deepspeed import unsharded_loading
from apo.packing.layout import pack_bins, shared_response_length
from clair.core.errors import UserError, one_line
from clair.inference.generation.onednn import speeds

if TYPE_CHECKING:
    from apo.models.load import ModelName

GIB = 2**30
MFU = 0.4
"""ASSUMPTION: the share of a GPU's bf16 peak that training reaches."""
CPU_SHARE = 0.5
"""ASSUMPTION: the share of a large matrix product's speed, measured briefly, that training reaches on a CPU."""
_MAX_LAYERS_LISTED = 12
"""Layer names that an error lists at most."""


# ---- the model


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that determine its costs. `linear` counts linear layers' weights without the LM head."""

    parameters: int
    linear: int
    adapter: int
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    tied: bool
    stored: int | None = None
    """Bytes of a number in the model's file, according to its config."""

    @property
    def trained(self) -> int:
        """The number of parameters with a gradient."""
        return self.adapter or self.parameters


def model_sizes(name: ModelName, lora: Any = None) -> ModelSizes:
    """Count a model's parameters on the meta device. `lora` is a PEFT config, or None.

    Raises UserError for a config that cannot be read, ValueError for a model that the formulas do not describe.
    """
    model = _without_weights(name)
    if lora is None and name.is_adapter:
        from peft import PeftConfig

        lora = PeftConfig.from_pretrained(name.path)
    return count_sizes(model, lora)


def check_adapter(name: ModelName, lora: Any) -> list[str]:
    """Apply an adapter, a PEFT config, to a model without weights. Returns notes for the user on its modules.

    Raises UserError if it matches no module of the model, or the LM head, which an adapter cannot train here.
    """
    import torch
    from peft import get_peft_model

    try:
        model = _without_weights(name)
    except (ValueError, AttributeError):  # a model that only its own code can build; loading it reports why
        return []
    head = model.get_output_embeddings()
    names = {module: path for path, module in model.named_modules()}
    linear = sorted(
        {
            path.rpartition(".")[2]
            for module, path in names.items()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )
    allowed = f"linear layers of the model: {', '.join(linear[:_MAX_LAYERS_LISTED])}"
    modules = lora.target_modules or []
    if lora.trainable_token_indices and model.config.get_text_config().tie_word_embeddings:
        raise UserError(
            "lora.trainable_token_indices: the LM head has the same weights as the embeddings, and its rows cannot be "
            "trained alone; train it whole: lora.modules_to_save: [embed_tokens] and lora.ensure_weight_tying: true"
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT repeats them for the model that is trained
            targets = get_peft_model(model, lora).base_model.targeted_module_names
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"lora: {one_line(error, 200)}; {allowed}") from error
    if head is not None and names[head] in targets:
        listed = modules if isinstance(modules, str) else ", ".join(sorted(modules))
        raise UserError(
            f"lora.target_modules: {listed} means {names[head]}, and an adapter to the LM head is not supported; "
            f"{allowed}"
        )
    listed_modules = [] if isinstance(modules, str) else sorted(modules)
    unmatched = [name for name in listed_modules if not any(f".{path}".endswith(f".{name}") for path in targets)]
    return [f"lora.target_modules: no module is called {', '.join(unmatched)}; {allowed}"] if unmatched else []


def _without_weights(name: ModelName) -> Any:
    """Build the model on the meta device. Raises UserError for a config that cannot be read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name.base, trust_remote_code=name.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name.base} has no config to read: {one_line(error)}") from error
    with unsharded_loading(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=name.trust_remote_code)


def count_sizes(model: Any, lora: Any = None) -> ModelSizes:
    """Count the parameters of a model on any device. A `lora` changes the model in place.

    Raises ValueError for a model that the formulas do not describe.
    """
    import torch

    config = model.config.get_text_config()
    required = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in required if not isinstance(getattr(config, key, None), int)]:
        raise ValueError(f"its config gives no single {missing[0]}")
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError("it is a mixture of experts")
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    parameters = sum(p.numel() for p in model.parameters())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tied = head.weight is model.get_input_embeddings().weight
    stored = getattr(config, "dtype", None)
    adapter = 0
    if lora is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            adapter = sum(p.numel() for p in get_peft_model(model, lora).parameters() if p.requires_grad)
    return ModelSizes(
        parameters,
        linear,
        adapter,
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * width,
        config.vocab_size,
        tied,
        getattr(stored, "itemsize", None),
    )


# ---- the pairs


@dataclass(frozen=True)
class PassCost:
    """The size of one forward pass: tokens, positions with a label, and query-key products of attention.

    `keys` counts the keys and values that are concatenated for rejected branches, `masked` their query-key products.
    """

    tokens: int
    labels: int
    products: int
    keys: int = 0
    masked: int = 0

    def __add__(self, other: PassCost) -> PassCost:
        return PassCost(*map(operator.add, astuple(self), astuple(other)))


def pair_cost(prompt: int, common: int, chosen: int, rejected: int) -> PassCost:
    """Return the size of a pair in a packed row, from the lengths of the prompt, of the responses' common beginning,
    and of both responses.

    tokens = prompt + chosen + rejected - common. The first branch has (prompt + chosen)^2 query-key products; the
    second has the remaining rejected tokens times all tokens that they attend to. Both are whole rectangles, since
    kernels without causal masking compute them.
    """
    first, branch = prompt + chosen, rejected - common
    context = prompt + common + branch
    second = branch * context
    return PassCost(first + branch, chosen + branch, first * first + second, context if branch else 0, second)


def pass_costs(
    examples: Sequence[dict[str, list[int]]], batch: int, max_tokens: int | None, shared: bool, seed: int
) -> list[PassCost]:
    """Return the forward passes of one epoch: pairs shuffled by `seed`, in batches of at most `max_tokens` tokens."""
    pairs = []
    for example in examples:
        prompt, chosen, rejected = (len(example[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        common = shared_response_length(example)
        if not (chosen and rejected):  # an unpaired row: one branch, whichever response it is
            chosen, rejected = chosen or rejected, 0
        pairs.append((prompt, common, chosen, rejected))
    random.Random(seed).shuffle(pairs)
    rows = []
    for start in range(0, len(pairs), batch):
        batch_pairs = pairs[start : start + batch]
        if not shared:
            longest = max(prompt + max(chosen, rejected) for prompt, _, chosen, rejected in batch_pairs)
            sequences = sum(2 if rejected else 1 for *_, rejected in batch_pairs)
            products = sequences * longest**2
            rows.append(PassCost(sequences * longest, sequences * longest, products, masked=products))
            continue
        costs = [pair_cost(*pair) for pair in batch_pairs]
        everything = [list(range(len(costs)))]
        bins = everything if max_tokens is None else pack_bins([cost.tokens for cost in costs], max_tokens)
        rows += [sum((costs[index] for index in bin), PassCost(0, 0, 0)) for bin in bins]
    return rows


# ---- the machine


@dataclass(frozen=True)
class Device:
    """A machine: bytes of memory, and floating-point operations per second that training reaches."""

    name: str
    memory: float
    flops: float
    is_gpu: bool = True
    reserved: float = 1.0 * GIB
    """Bytes in use before the first tensor: the CUDA context, or Python with its libraries."""


GPUS = (
    Device("A100 80GB", 80 * GIB, 312e12 * MFU),
    Device("H100 80GB", 80 * GIB, 989e12 * MFU),
    Device("H200 141GB", 140 * GIB, 989e12 * MFU),
    Device("RTX 4090 24GB", 24 * GIB, 165e12 * MFU),
)
"""Flops are the manufacturer's dense bf16 peaks, times `MFU`."""


def this_machine() -> Device:
    """Return the current machine, with the memory that the operating system or the container's limit states.

    A CPU's speed is the measured speed of a matrix product of 1024 times `CPU_SHARE`; a GPU's is that of the `GPUS`
    entry whose name matches, else the A100's.
    """
    import torch

    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
        listed = next((gpu for gpu in GPUS if gpu.name.split(" ")[-2] in name), GPUS[0])
        return Device(f"this machine: {name}", memory, listed.flops)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text("utf-8").strip()).isdigit():
        memory = min(memory, int(text))
    return Device("this machine: CPU", memory, max(speeds()) * CPU_SHARE, is_gpu=False, reserved=0.8 * GIB)
