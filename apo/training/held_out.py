"""The held-out pairs after training: the log-ratios of each, from which `apo sweep` picks a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apo.monitoring.prediction import right_order
from clair.core.files import content_hash

if TYPE_CHECKING:
    from apo.training.trainer import APOTrainer


def held_out_rows(trainer: APOTrainer) -> list[dict[str, Any]]:
    """The rows of held_out.jsonl: `right` is 1 if the chosen answer has the larger reward, and 1/2 for a tie."""
    pairs: Any = trainer.eval_dataset
    rows = []
    for index, (pair, values) in enumerate(zip(pairs, trainer.held_out_logratios(), strict=True)):
        chosen, rejected, rounding, _ = values
        prompt = content_hash(list(pair["prompt_ids"]))[:16]
        row = {"id": str(pair.get("id", index)), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append({**row, "right": right_order(chosen, rejected, rounding)})
    return rows
