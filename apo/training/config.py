"""TrainConfig: a training recipe, and the configurations of the trainer and of PEFT that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_serializer, field_validator

from apo.data.sources import Source
from apo.monitoring.guard import Guard
from clair.core.errors import UserError, near_miss, one_line
from clair.core.recipe import Recipe, check_booleans

if TYPE_CHECKING:
    from apo.training.trainer_config import APOConfig

RECIPE_KEYS = {
    "output_dir": "out",
    "seed": "seed",
    "beta": "beta",
    "objective": "objective",
    "weights": "weights",
    "trust_remote_code": "trust_remote_code",
    "precompute_ref_log_probs": "reference",
    "reference_cache": "reference",
    "soft_prompt": "soft_prompt",
    "soft_prompt_tokens": "soft_prompt",
}
"""Options of TRL that are keys of the recipe itself, and those keys."""
_LORA_KEYS = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Options of peft that have another name in the recipe."""
_UNSUPPORTED_LORA = {
    **dict.fromkeys(
        ("bias", "kasa_config", "layer_replication"),
        "switched off, the adapter would not leave the model it began with",
    ),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config"), "it acts on some tokens of a row only"),
    **dict.fromkeys(("task_type", "peft_type", "inference_mode", "base_model_name_or_path"), "`apo train` sets it"),
}
"""Options of peft that a run cannot use, and why."""
_NEED_PREPARATION = ("corda", "eva", "loftq", "lora_ga")
UNSUPPORTED = (
    *("resume_from_checkpoint", "push_to_hub", "do_train", "do_eval", "do_predict", "remove_unused_columns"),
    "parallelism_config",  # an object, which no recipe can hold
)


class LoRA(Recipe):
    """`lora:` of a training recipe, with any other option of PEFT's LoraConfig. Absent: the whole model is trained."""

    model_config = ConfigDict(extra="allow")

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] | None = "all-linear"
    """Module names, or `all-linear`: every linear layer but the LM head."""


class SoftPromptConfig(Recipe):
    """`soft_prompt:` of a training recipe: one policy for all users, each with embeddings in front of the turn."""

    column: str = "state"
    """The column of the pairs with the state of their user, a list of numbers, as `apo reward score` writes it."""
    tokens: Annotated[int, Field(gt=0)] | None = None
    """Embeddings. Absent: all tokens that the chat template writes in front of every prompt, at most 8."""


def _listed(value: Any) -> Any:
    """A recipe's `dataset` as a list of sources, so that an error names the key and not a branch of a union."""
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": source} if isinstance(source, str) else source for source in values]


class TrainConfig(Recipe):
    """A training recipe. See docs/training.md."""

    model: str
    """A model folder, a folder with a LoRA adapter to train on, or a hub name."""
    dataset: Annotated[list[Source], BeforeValidator(_listed)]
    """One source or several; a string is the path of a source."""
    by: str | None = None
    """A column of the pairs: one run per value, each in a subfolder of `out`. Absent: one run on all pairs."""
    objective: str | dict[Any, Any] | Callable[..., Any] = "apo_zero"
    """The name of an objective, or several with weights and options (mixture.py); in Python also functions."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    weights: str | None = None
    """The dataset column with the weight of each pair: numbers, finite and >= 0. Absent: all weigh the same."""
    lora: LoRA | None = None
    soft_prompt: SoftPromptConfig | None = None
    """Train a policy that reads the state of the pair's user in front of the turn. Absent: the same for all users."""
    quantize: Literal["nf4"] | None = None
    """`nf4`: weights below the adapter are stored in 4 bits (QLoRA). Absent: in the type they are loaded in."""
    pairs_per_step: Annotated[int, Field(gt=0)] | None = None
    """Pairs per optimizer step, over all processes. Absent: `trainer`'s batch sizes times the processes."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Options of TRL's DPOConfig and transformers' TrainingArguments, passed on untouched."""
    eval: bool | str = True
    """Held-out pairs: true is the split `test` if it exists, a name is that split, a path is a file or folder, false is
    none."""
    reference: Literal["cached", "online"] = "cached"
    """`cached`: the reference's log-probs are computed before the first step, once for all runs on the same model and
    pairs; `online`: at every step, by a second copy of the model."""
    guard: Guard | None = None
    """Held-out text and tasks on which the model must not get worse. Absent: none are measured."""
    eval_rows: bool = False
    """Write held_out.jsonl at the end: the rewards of each held-out pair. `apo sweep` sets it."""
    prediction: str | None = None
    """The `out` of `apo distinguish`: its groups are measured on held-out pairs ten times in the run, and `apo
    diagnose` says whether they were learned in the predicted order."""
    probe: Annotated[int, Field(ge=0)] | None = None
    """Pairs looked at token by token (token_diagnostics.py). Absent: one for a hundred trained, at most 16; 0: none."""
    samples: Annotated[int, Field(ge=0)] | None = None
    """Prompts answered at each inspection (sample_answers.py). Absent: five, if that costs under 3 % of the run; 0:
    none."""
    seed: int = 0
    out: str
    trust_remote_code: bool = False

    @field_validator("quantize")
    @classmethod
    def _needs_adapter(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not info.data.get("lora"):
            raise ValueError(
                f"{value} weights cannot be trained, only an adapter on them: set `lora: {{r: 16}}` as well"
            )
        return value

    @field_validator("prediction")
    @classmethod
    def _needs_one_run(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and info.data.get("by"):
            raise ValueError("it compares groups within a run, and `by` trains a run for each; leave one of them out")
        return value

    @field_validator("objective")
    @classmethod
    def _check_objective(cls, value: Any) -> Any:
        from apo.losses.mixture import resolve_mixture

        resolve_mixture(value)
        return value

    @field_serializer("objective")
    def _objective_spec(self, value: Any) -> str | dict[str, Any]:
        from apo.losses.mixture import resolve_mixture

        return resolve_mixture(value).spec


def trainer_options(config: TrainConfig, *, has_eval: bool, processes: int = 1) -> APOConfig:
    """The trainer's configuration. Raises UserError for an option that TRL lacks or that is a key of the recipe."""
    import dataclasses

    from apo.losses.mixture import resolve_mixture
    from apo.monitoring.metrics import check_best_metric
    from apo.training.trainer_config import IGNORED, APOConfig, ignored_reason
    from clair.storage.location import cache_root

    allowed = (
        {field.name for field in dataclasses.fields(APOConfig)} - set(RECIPE_KEYS) - set(IGNORED) - set(UNSUPPORTED)
    )
    for key in config.trainer:
        if key in RECIPE_KEYS:
            raise UserError(f"trainer.{key}: it is a key of the recipe itself, {RECIPE_KEYS[key]!r}; move it there")
        if key in IGNORED:
            raise UserError(
                f"trainer.{ignored_reason(key, config.trainer[key], resolve_mixture(config.objective).name)}"
            )
        if key in UNSUPPORTED:
            raise UserError(f"trainer.{key} is not offered by `apo train`; leave it out")
        if key not in allowed:
            near = near_miss(key, allowed) or "; see TRL's DPOConfig and transformers' TrainingArguments"
            raise UserError(f"trainer.{key}: no such option{near}")
    _check_types(config.trainer, APOConfig, "trainer")
    _check_ranges(config.trainer)
    eval_strategy = "epoch" if config.trainer.get("eval_steps") is None else "steps"
    defaults: dict[str, Any] = {"eval_strategy": eval_strategy} if has_eval else {}
    defaults |= {"save_total_limit": 2} if config.guard else {}
    defaults |= _batch_sizes(config, processes)
    objective = resolve_mixture(config.objective)
    if config.reference == "cached" and objective.needs_reference and not objective.needs_divergence:
        defaults |= {"precompute_ref_log_probs": True, "reference_cache": str(cache_root())}
    _check_trackers(config.trainer.get("report_to"))
    check_best_metric(config.trainer.get("metric_for_best_model"), objective)
    try:
        return APOConfig(
            **{**defaults, **config.trainer},
            output_dir=config.out,
            seed=config.seed,
            beta=config.beta,
            objective=config.objective,
            weights=config.weights,
            soft_prompt=config.soft_prompt.column if config.soft_prompt else None,
            soft_prompt_tokens=config.soft_prompt.tokens if config.soft_prompt else None,
            trust_remote_code=config.trust_remote_code,
        )
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"trainer: {one_line(error)}") from error


def _batch_sizes(config: TrainConfig, processes: int) -> dict[str, int]:
    """Size and number of the micro-batches of a step, if the recipe sets `pairs_per_step`."""
    pairs, size = config.pairs_per_step, config.trainer.get("per_device_train_batch_size")
    if pairs is None:
        return {}
    if "gradient_accumulation_steps" in config.trainer:
        raise UserError("trainer.gradient_accumulation_steps follows from pairs_per_step; leave one of them out")
    each, remainder = divmod(pairs, processes)
    if remainder:
        raise UserError(f"pairs_per_step: {pairs} cannot be divided equally among {processes} processes")
    if size is None:
        size = next(size for size in range(min(8, each), 0, -1) if each % size == 0)
    if size < 1 or each % size:
        raise UserError(
            f"pairs_per_step: {pairs} on {processes} process(es) is {each} each, no multiple of "
            f"trainer.per_device_train_batch_size {size}"
        )
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}


def _check_types(options: dict[str, Any], owner: type, section: str) -> None:
    """Raises UserError for a value of the wrong type, such as `learning_rate: fast`, which TRL accepts at first.

    `owner` is the dataclass that gets the options of a `section` of the recipe.
    """
    import typing

    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    # The annotations of these two name text or a few values, and others are meant too.
    hints = typing.get_type_hints(owner) | dict.fromkeys(("fsdp", "init_lora_weights"), bool | str)
    for key, value in options.items():
        try:
            parsed = TypeAdapter(hints[key]).validate_python(value)  # pyright: ignore[reportArgumentType]  # any type form
            if isinstance(value, Mapping):
                check_booleans(value)
        except ValidationError as error:
            raise UserError(f"{section}.{key}: {error.errors()[0]['msg']}, got {value!r}") from error
        except ValueError as error:
            raise UserError(f"{section}.{key}: {error}") from error
        except PydanticUserError:  # a type that pydantic does not know
            continue
        if isinstance(parsed, bool) and isinstance(value, str):  # which the trainer takes as true
            raise UserError(f"{section}.{key}: found {value!r}; allowed: true, false")


_POSITIVE = (
    "gradient_accumulation_steps",
    "num_train_epochs",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
)


def _check_ranges(options: dict[str, Any]) -> None:
    """Raises UserError for numbers that TRL does not check, and that fail later or train nothing."""
    for key in _POSITIVE:
        if key in options and not 0 < float(options[key]) < math.inf:
            raise UserError(f"trainer.{key} is {options[key]!r}; it must be above 0, and finite")
    for key in ("learning_rate", "dataloader_num_workers"):
        if key in options and not 0 <= float(options[key]) < math.inf:
            raise UserError(f"trainer.{key} is {options[key]!r}; it must be 0 or above, and finite")
    if (steps := options.get("max_steps", -1)) != -1 and not int(steps) > 0:
        raise UserError(f"trainer.max_steps is {steps!r}; give 1 or more, or leave it out and train num_train_epochs")


def _check_trackers(report_to: str | list[str] | None) -> None:
    """Raises UserError for a tracker that is unknown or not installed; transformers fails after it loads the model."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    available = {"all", "none", "flyte", *get_available_reporting_integrations()}  # which does not check for flyte
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in (*available, *INTEGRATION_TO_CALLBACK):
            raise UserError(
                f"trainer.report_to: no tracker {name!r}{near_miss(name, INTEGRATION_TO_CALLBACK)}; "
                f"allowed: {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in available:
            raise UserError(f"trainer.report_to: {name} is not installed; install its package, or leave it out")


def lora_config(config: TrainConfig) -> Any:
    """PEFT's configuration for the recipe's `lora`, or None. Raises UserError for an option that it refuses."""
    if config.lora is None:
        return None
    import dataclasses
    import warnings

    from peft import LoraConfig

    from apo.models.decomposed_lora import is_decomposed

    options = config.lora.model_extra or {}
    allowed = {field.name for field in dataclasses.fields(LoraConfig)} - set(_LORA_KEYS) - set(_UNSUPPORTED_LORA)
    for key, value in options.items():
        if key in _LORA_KEYS:
            raise UserError(f"lora.{key} is called {_LORA_KEYS[key]!r} here; write lora.{_LORA_KEYS[key]}")
        if key in _UNSUPPORTED_LORA:
            raise UserError(f"lora.{key}: {value!r} is not supported: {_UNSUPPORTED_LORA[key]}; leave it out")
        if key not in allowed:
            raise UserError(f"lora.{key}: no such option{near_miss(key, allowed) or '; see the LoraConfig of peft'}")
    _check_types(options, LoraConfig, "lora")
    if (start := options.get("init_lora_weights")) in _NEED_PREPARATION:
        raise UserError(
            f"lora.init_lora_weights: {start} needs a pass over data before training, which `apo train` does not make; "
            "choose true, gaussian, orthogonal, mica, olora, pissa or pissa_niter_16"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # about options that have no effect
            warnings.filterwarnings(
                "ignore", "Using Rank-Stabilized LoRA", UserWarning
            )  # `write_plain` converts that too
            lora = LoraConfig(
                r=config.lora.r,
                lora_alpha=config.lora.alpha,  # pyright: ignore[reportArgumentType]  # a float works
                lora_dropout=config.lora.dropout,
                target_modules=config.lora.target_modules,
                task_type="CAUSAL_LM",
                **options,
            )
    except (ValueError, TypeError, ImportError, UserWarning) as error:
        raise UserError(f"lora: {one_line(error)}") from error
    if config.quantize and is_decomposed(lora):
        raise UserError(
            f"lora.init_lora_weights: {start} takes its start out of the weights below, which must "
            "not have 4 bits; leave quantize out, or choose another start"
        )
    return lora
