"""Anchored preference optimization (APO, arXiv 2408.06266): `train`, `evaluate`, `compare`, `advise`, and objectives.

Importing this loads no heavy module; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apo.api import TrainingResult, advise, compare, evaluate, evaluate_ifeval, train
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
    from apo.models.load import load_for_user
    from apo.training.config import TrainConfig
    from apo.training.trainer import APOTrainer
    from apo.training.trainer_config import APOConfig

__all__ = [
    "OBJECTIVES",
    "APOConfig",
    "APOTrainer",
    "TrainConfig",
    "TrainingResult",
    "advise",
    "apo_down",
    "apo_hinge_zero",
    "apo_zero",
    "apo_zero_unpaired",
    "compare",
    "dpo",
    "evaluate",
    "evaluate_ifeval",
    "ipo",
    "kto",
    "load_for_user",
    "robust",
    "sft",
    "simpo",
    "train",
]

_HOME = {
    **dict.fromkeys(("TrainingResult", "advise", "compare", "evaluate", "evaluate_ifeval", "train"), "api"),
    **dict.fromkeys(("OBJECTIVES", "apo_down", "apo_hinge_zero", "apo_zero", "apo_zero_unpaired"), "losses.objectives"),
    **dict.fromkeys(("dpo", "ipo", "kto", "robust", "sft", "simpo"), "losses.objectives"),
    "load_for_user": "models.load",
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
