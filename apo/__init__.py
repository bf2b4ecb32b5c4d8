"""Preference pairs to a better model: objectives, a trainer on TRL, and `apo train`.

Importing this costs nothing; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apo.losses.objectives import (
        OBJECTIVES,
        apo_down,
        apo_hinge_zero,
        apo_zero,
        apo_zero_unpaired,
        dpo,
        ipo,
        kto,
        robust,
        sft,
        simpo,
    )
    from apo.training.config import TrainConfig
    from apo.training.trainer import APOTrainer
    from apo.training.trainer_config import APOConfig

__all__ = [
    "OBJECTIVES",
    "APOConfig",
    "APOTrainer",
    "TrainConfig",
    "apo_down",
    "apo_hinge_zero",
    "apo_zero",
    "apo_zero_unpaired",
    "dpo",
    "ipo",
    "kto",
    "robust",
    "sft",
    "simpo",
]

_HOME = {
    **dict.fromkeys(("OBJECTIVES", "apo_down", "apo_hinge_zero", "apo_zero", "apo_zero_unpaired"), "losses.objectives"),
    **dict.fromkeys(("dpo", "ipo", "kto", "robust", "sft", "simpo"), "losses.objectives"),
    "APOConfig": "training.trainer_config",
    "APOTrainer": "training.trainer",
    "TrainConfig": "training.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
