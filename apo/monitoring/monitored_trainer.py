"""The interface of a trainer that monitors read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState

    from apo.losses.mixture import Mixture
    from apo.monitoring.throughput import Meter
    from apo.packing.batch import Batch


class MonitoredTrainer(Protocol):
    """A trainer as guard, token diagnostics and failure checks see it.

    `args` (an APOConfig), `model` and the datasets are Any, because transformers declares them wider than a trainer
    that runs has them: as base classes, or optional.
    """

    @property
    def args(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def ref_model(self) -> Any: ...
    @property
    def train_dataset(self) -> Any: ...
    @property
    def eval_dataset(self) -> Any: ...
    @property
    def state(self) -> TrainerState: ...
    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def objective(self) -> Mixture: ...
    @property
    def meter(self) -> Meter: ...

    @property
    def is_packed(self) -> bool:
        """True if pairs run in packed rows, without padding, each prompt once."""
        ...

    @property
    def current_batch(self) -> Batch | None:
        """The batch in the current forward pass."""
        ...

    def evaluation_mode(self) -> AbstractContextManager[None]:
        """Eval mode without gradient, in the precision of a training step."""
        ...

    def response_logps(self, examples: Sequence[dict[str, Any]]) -> list[float]:
        """Log-prob of the chosen response of each example, in nats; every process must call it."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Log metrics at the current step."""
        ...
