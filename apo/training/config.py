"""TrainConfig: a training recipe, and what it says to the trainer and to PEFT."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, field_validator

from apo.data.sources import Source
from apo.monitoring.guard import Guard
from clair.core.errors import UserError, near_miss, one_line
from clair.core.recipe import Recipe

if TYPE_CHECKING:
    from apo.training.trainer_config import APOConfig

OWN_KEYS = {
    "output_dir": "out",
    "seed": "seed",
    "beta": "beta",
    "objective": "objective",
    "weights": "weights",
    "trust_remote_code": "trust_remote_code",
    "precompute_ref_log_probs": "reference",
    "reference_cache": "reference",
}
"""Options of TRL that the recipe says at its top."""
NOT_OFFERED = ("resume_from_checkpoint", "push_to_hub", "do_train", "do_eval", "do_predict", "remove_unused_columns")


class LoRA(Recipe):
    """`lora:` of a training recipe. Absent: the whole model is trained."""

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    """Module names, or `all-linear`: every linear layer but the LM head."""


def _listed(value: Any) -> Any:
    """A recipe's `dataset` as a list of sources, so that an error names the key and not an arm of a union."""
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": one} if isinstance(one, str) else one for one in values]


class TrainConfig(Recipe):
    """A training recipe. See docs/training.md."""

    model: str
    """A model folder, a folder with a LoRA adapter to train on, or a hub name."""
    dataset: Annotated[list[Source], BeforeValidator(_listed)]
    """One source or several; a text is a source's path."""
    by: str | None = None
    """A column of the pairs: a run for each of its values, each in a folder of `out`. Absent: one run on all."""
    objective: str | dict[Any, Any] | Callable[..., Any] = "apo_zero"
    """An objective's name, or several with weights and options (mixture.py); from Python also functions."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    weights: str | None = None
    """The dataset column that says how much each pair weighs: numbers, finite and >= 0. Absent: all alike."""
    lora: LoRA | None = None
    quantize: Literal["nf4"] | None = None
    """`nf4`: the weights below the adapter are kept in 4 bits (QLoRA). Absent: in the type they are loaded in."""
    pairs_per_step: Annotated[int, Field(gt=0)] | None = None
    """Pairs in an optimizer step, over all processes. Absent: what `trainer` and the number of processes come to."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Options of TRL's DPOConfig and transformers' TrainingArguments, passed on untouched."""
    eval: bool | str = True
    """Held-out pairs: true is the split `test` where there is one, a name that split, a path a file or folder of its
    own, false none."""
    reference: Literal["cached", "online"] = "cached"
    """`cached`: the reference's log-probs are computed before the first step, once per model and pairs for all runs;
    `online`: at every step, by a second copy of the model."""
    guard: Guard | None = None
    """Held-out text and tasks that the model may not lose. Absent: none are looked at."""
    probe: Annotated[int, Field(ge=0)] | None = None
    """Pairs looked at token by token (token_diagnostics.py). Absent: one for a hundred trained, at most 16; 0: none."""
    seed: int = 0
    out: str
    trust_remote_code: bool = False

    @field_validator("quantize")
    @classmethod
    def _below_an_adapter(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not info.data.get("lora"):
            raise ValueError(f"{value} weights cannot be trained, an adapter on them can: set `lora: {{r: 16}}` beside")
        return value

    @field_validator("objective")
    @classmethod
    def _known(cls, value: Any) -> Any:
        from apo.losses.mixture import resolve_mixture

        resolve_mixture(value)
        return value

    @field_serializer("objective")
    def _by_name(self, value: Any) -> str | dict[str, Any]:
        from apo.losses.mixture import resolve_mixture

        return resolve_mixture(value).spec


def trainer_options(config: TrainConfig, *, has_eval: bool, processes: int = 1) -> APOConfig:
    """The trainer's configuration. Raises UserError for an option TRL does not have, or that the recipe says."""
    import dataclasses

    from apo.losses.mixture import resolve_mixture
    from apo.models.tensor_cache import default_folder
    from apo.monitoring.metrics import check_best_metric
    from apo.training.trainer_config import IGNORED, APOConfig, why_ignored

    allowed = {field.name for field in dataclasses.fields(APOConfig)} - set(OWN_KEYS) - set(IGNORED) - set(NOT_OFFERED)
    for key in config.trainer:
        if key in OWN_KEYS:
            raise UserError(f"trainer.{key}: the recipe says it at its top, as {OWN_KEYS[key]!r}; move it there")
        if key in IGNORED:
            raise UserError(f"trainer.{why_ignored(key, config.trainer[key], resolve_mixture(config.objective).name)}")
        if key in NOT_OFFERED:
            raise UserError(f"trainer.{key} is not offered by `apo train`; leave it out")
        if key not in allowed:
            near = near_miss(key, allowed) or "; see TRL's DPOConfig and transformers' TrainingArguments"
            raise UserError(f"trainer.{key}: no such option{near}")
    _check_types(config.trainer)
    _check_ranges(config.trainer)
    defaults: dict[str, Any] = {"eval_strategy": "epoch"} if has_eval else {}
    defaults |= {"save_total_limit": 2} if config.guard else {}
    defaults |= _step_of(config, processes)
    objective = resolve_mixture(config.objective)
    if config.reference == "cached" and objective.needs_reference and not objective.needs_divergence:
        defaults |= {"precompute_ref_log_probs": True, "reference_cache": str(default_folder())}
    _check_trackers(config.trainer.get("report_to"))
    check_best_metric(config.trainer.get("metric_for_best_model"), objective)
    try:
        return APOConfig(
            **{**defaults, **config.trainer}, output_dir=config.out, seed=config.seed, beta=config.beta,
            objective=config.objective, weights=config.weights, trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"trainer: {one_line(error)}") from error


def _step_of(config: TrainConfig, processes: int) -> dict[str, int]:
    """Size and number of the micro-batches of a step of `pairs_per_step` pairs, where the recipe says them."""
    pairs, size = config.pairs_per_step, config.trainer.get("per_device_train_batch_size")
    if pairs is None:
        return {}
    if "gradient_accumulation_steps" in config.trainer:
        raise UserError("trainer.gradient_accumulation_steps follows from pairs_per_step; leave one of them out")
    each, left = divmod(pairs, processes)
    if left:
        raise UserError(f"pairs_per_step: {pairs} cannot be shared out equally to {processes} processes")
    if size is None:
        size = next(size for size in range(min(8, each), 0, -1) if each % size == 0)
    if size < 1 or each % size:
        raise UserError(
            f"pairs_per_step: {pairs} on {processes} process(es) is {each} each, no multiple of "
            f"trainer.per_device_train_batch_size {size}"
        )
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}


def _check_types(options: dict[str, Any]) -> None:
    """TRL takes any value for any option and fails later. Here `learning_rate: fast` fails now."""
    import typing

    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    from apo.training.trainer_config import APOConfig

    hints = typing.get_type_hints(APOConfig) | {"fsdp": bool | str}  # transformers says text, and means a switch
    for key, value in options.items():
        try:
            TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"trainer.{key}: {error.errors()[0]['msg']}, found {value!r}") from error
        except PydanticUserError:  # a type only TRL can judge
            continue


_ABOVE_0 = (
    "gradient_accumulation_steps",
    "num_train_epochs",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
)


def _check_ranges(options: dict[str, Any]) -> None:
    """What neither TRL nor transformers looks at, and torch or a division would fail on later, or train nothing."""
    for key in _ABOVE_0:
        if key in options and not float(options[key]) > 0:
            raise UserError(f"trainer.{key} is {options[key]!r}; it must be above 0")
    if (rate := options.get("learning_rate", 0)) and not float(rate) > 0:
        raise UserError(f"trainer.learning_rate is {rate!r}; it must be 0 or above")
    if (steps := options.get("max_steps", -1)) != -1 and not int(steps) > 0:
        raise UserError(f"trainer.max_steps is {steps!r}; give 1 or more, or leave it out and train num_train_epochs")


def _check_trackers(asked: str | list[str] | None) -> None:
    """transformers takes any name, and fails on those that are not there after the model is loaded."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK as KNOWN
    from transformers.integrations import get_available_reporting_integrations

    there = {"all", "none", "flyte", *get_available_reporting_integrations()}  # which does not look for flyte
    for name in [asked] if isinstance(asked, str) else asked or []:
        if name not in (*there, *KNOWN):
            raise UserError(
                f"trainer.report_to: no tracker {name!r}{near_miss(name, KNOWN)}; allowed: {', '.join(KNOWN)}"
            )
        if name not in there:
            raise UserError(f"trainer.report_to: {name} is not installed here; install its package, or leave it out")


class _ReadOptions(dict[str, str]):
    """Options of an optimizer, with the `names` of those that it looks up."""

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(options)
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def pop(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self.names.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self.names.update(super().keys())
        return super().keys()


class _NeedsModel(Exception):
    """An optimizer looks at the model that it trains."""


class _UnloadedModel:
    def named_modules(self) -> Any:
        raise _NeedsModel


def check_optimizer(args: APOConfig, steps: int) -> None:
    """Set up the optimizer of a single weight, and its learning rate over `steps`, as training will.

    Raises UserError for what cannot be set up, and for `optim_args` that the optimizer does not read: transformers
    passes over them.
    """
    import torch
    from transformers.optimization import get_scheduler
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext, _parse_optim_args

    name = getattr(args.optim, "value", args.optim)
    weight = torch.nn.Parameter(torch.zeros(1))
    with setup_errors(f"trainer.optim {name}", "optim, optim_args and adam_"):
        handler = _OPTIMIZER_HANDLERS.get(args.optim)
        if handler is None:
            raise ValueError("transformers has no such optimizer")
        try:
            options = _ReadOptions(_parse_optim_args(args.optim_args))
        except ValueError as error:
            raise UserError(f"trainer.optim_args is {args.optim_args!r}; write name=value, ...") from error
        adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        context = OptimizerContext(args, _UnloadedModel(), {"lr": args.learning_rate}, adam, options)
        with suppress(_NeedsModel):
            optimizer, arguments = handler(context)
            if optimizer.__module__.startswith("torch.optim"):
                optimizer([weight], **arguments)
            elif not {"model", "params"} & set(arguments):
                inspect.signature(optimizer).bind([weight], **arguments)
    if unread := next((option for option in dict.keys(options) if option not in options.names), None):
        allowed = ", ".join(sorted(options.names)) or "none"
        raise UserError(
            f"trainer.optim_args: {name} has no option {unread!r}{near_miss(unread, options.names)}; options: {allowed}"
        )
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    with setup_errors(f"trainer.lr_scheduler_type {kind}", "lr_scheduler_kwargs"):
        get_scheduler(
            args.lr_scheduler_type, torch.optim.SGD([weight], lr=args.learning_rate), args.get_warmup_steps(steps),
            steps, args.lr_scheduler_kwargs,
        )  # fmt: skip


@contextmanager
def setup_errors(what: str, options: str) -> Iterator[None]:
    """Raise UserError for what transformers or torch raise of an option's value."""
    try:
        yield
    except UserError:
        raise
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"{what} cannot be set up: {one_line(error)}; change it, or its options ({options})") from error


def lora_config(config: TrainConfig) -> Any:
    """PEFT's configuration of the recipe's `lora`, or None."""
    if config.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules, task_type="CAUSAL_LM",
    )  # fmt: skip
