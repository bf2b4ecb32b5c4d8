"""Preference pairs to a better model: objectives, a trainer on TRL, and `apo train`.

Importing this costs nothing; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apo.objectives import OBJECTIVES, apo_down, apo_zero, apo_zero_unpaired, dpo, kto, sft
    from apo.train import TrainConfig
    from apo.trainer import APOConfig, APOTrainer

__all__ = [
    "OBJECTIVES",
    "APOConfig",
    "APOTrainer",
    "TrainConfig",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "dpo",
    "kto",
    "sft",
]

_HOME = {
    **dict.fromkeys(("OBJECTIVES", "apo_down", "apo_zero", "apo_zero_unpaired", "dpo", "kto", "sft"), "objectives"),
    **dict.fromkeys(("APOConfig", "APOTrainer"), "trainer"),
    "TrainConfig": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
