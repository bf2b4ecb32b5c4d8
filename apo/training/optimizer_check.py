"""Checks of the optimizer and the learning rate schedule, set up on a single weight before the model is loaded."""

from __future__ import annotations

import inspect
import math
from collections import UserDict
from collections.abc import Iterator, Sized
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, near_miss, one_line

if TYPE_CHECKING:
    from apo.training.trainer_config import APOConfig


class _ReadOptions(UserDict[str, str]):
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

    def __iter__(self) -> Iterator[str]:
        self.names.update(self.data)
        return super().__iter__()


class _NeedsModel(Exception):
    """An optimizer needs the model that it trains."""


class _UnloadedModel:
    def parameters(self) -> Iterator[Any]:
        return iter(())

    def named_modules(self) -> Any:
        raise _NeedsModel


def count_steps(args: APOConfig, pairs: Sized, processes: int | None = None) -> int:
    """Optimizer steps of the run, as the trainer counts them; `pairs` of unknown number need `max_steps`."""
    if args.max_steps > 0:
        return args.max_steps
    batches = len(pairs) / (args.per_device_train_batch_size * (processes or args.world_size))
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def check_optimizer(args: APOConfig, steps: int, prefix: str = "trainer.") -> None:
    """Set up the optimizer on a single weight, and its learning rate schedule over `steps`, as training will.

    Errors name the options with `prefix`. Raises UserError for what cannot be set up, and for `optim_args` that the
    optimizer does not read, which transformers ignores.
    """
    import torch
    from transformers.optimization import get_scheduler
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext, _parse_optim_args

    name = getattr(args.optim, "value", args.optim)
    weight = torch.nn.Parameter(torch.zeros(1))
    with setup_errors(f"{prefix}optim {name}", "optim, optim_args and adam_"):
        handler = _OPTIMIZER_HANDLERS.get(args.optim)
        if handler is None:
            raise ValueError("transformers has no such optimizer")
        try:
            optim_options = _parse_optim_args(args.optim_args)
        except ValueError as error:
            raise UserError(f"{prefix}optim_args is {args.optim_args!r}; write name=value, ...") from error
        options: Any = _ReadOptions(optim_options)
        adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        model: Any = _UnloadedModel()
        context = OptimizerContext(args, model, {"lr": args.learning_rate}, adam, options)
        with suppress(_NeedsModel):
            optimizer, arguments = handler(context)
            if optimizer.__module__.startswith("torch.optim"):
                optimizer([weight], **arguments)
            elif not {"model", "params"} & set(arguments):
                inspect.signature(optimizer).bind([weight], **arguments)
    if unread := next((option for option in optim_options if option not in options.names), None):
        allowed = ", ".join(sorted(options.names)) or "none"
        raise UserError(
            f"{prefix}optim_args: {name} has no option {unread!r}{near_miss(unread, options.names)}; options: {allowed}"
        )
    schedule_options = args.lr_scheduler_kwargs
    assert not isinstance(schedule_options, str)  # TrainingArguments parses JSON text
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    with setup_errors(f"{prefix}lr_scheduler_type {kind}", "lr_scheduler_kwargs"):
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([weight], lr=args.learning_rate),
            args.get_warmup_steps(steps),
            steps,
            schedule_options,
        )


@contextmanager
def setup_errors(subject: str, options: str) -> Iterator[None]:
    """Turn errors of transformers or torch about `subject` into a UserError that names its `options`."""
    try:
        yield
    except UserError:
        raise
    except (ImportError, TypeError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"{subject} cannot be set up: {reason}; change it, or its options ({options})") from error
