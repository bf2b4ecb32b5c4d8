"""The cells of the experiment: objective, pairs and learning rates.

The validation prompts choose each cell's rate and number of epochs. The primary cell is the first. The grid was fixed
before any trained model answered the benchmark (docs/log).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EPOCHS = 2
"""Each run saves a checkpoint per epoch; each is a candidate."""
LORA_RATES, FULL_RATES = (3e-4, 1e-3), (1e-5, 3e-5)


@dataclass(frozen=True)
class Cell:
    """One objective on one set of pairs, as keys of train.yaml."""

    name: str
    pairs: str = "clair"
    objective: str = "apo_zero"
    rates: Sequence[float] = LORA_RATES
    settings: Mapping[str, Any] = field(default_factory=dict)


PRIMARY = Cell("clair-apo_zero")
CELLS: tuple[Cell, ...] = (
    PRIMARY,
    Cell("clair-dpo", objective="dpo"),
    Cell("clair-sft", objective="sft"),
    Cell("judged-apo_zero", pairs="judged"),
    Cell("clair-apo_zero-full", rates=FULL_RATES, settings={"lora": None}),
    Cell("clair-apo_zero-bf16", settings={"trainer.model_init_kwargs": {"dtype": "bfloat16"}}),
)
