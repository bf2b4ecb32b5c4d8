"""KTO's divergence: the mean log-ratio of prompts with the responses of other pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from apo.distributed.launch import sum_over_processes
from apo.packing.batch import STATE, PairBatch
from apo.packing.layout import SIDES
from apo.packing.logps import PairLogps

if TYPE_CHECKING:
    from accelerate import Accelerator

_TOKENS = ("prompt_ids", *(f"{side}_{kind}" for side in SIDES for kind in ("ids", "mask")))


def estimate_divergence(
    batches: Sequence[PairBatch],
    compute: Callable[[PairBatch], tuple[PairLogps, tuple[torch.Tensor, torch.Tensor]]],
    accelerator: Accelerator,
) -> torch.Tensor:
    """KTO's kl: the mean log-ratio, in nats, of each prompt with the next pair's responses, [2]: summed over their
    tokens, and as the mean over them. 0 for one pair. Every response counts equally, whatever its pair weighs.

    `compute` gives the log-probs of a batch by policy and reference. The rotation runs over the whole optimizer step of
    all processes, so that it depends neither on the size of a micro-batch nor on the number of processes.
    """
    totals = torch.zeros(3, device=accelerator.device)
    for batch in rotate_responses(batches, gather_object, accelerator.process_index):
        policy, reference = compute(batch)
        ratios = torch.cat([policy.chosen - reference[0], policy.rejected - reference[1]]).float()
        lengths = torch.cat([policy.chosen_len, policy.rejected_len])
        if not batch.dummy:  # run nevertheless: sharded processes run equally many passes
            totals += torch.stack([ratios.sum(), (ratios / lengths.clamp(min=1)).sum(), (lengths > 0).sum()])
    totals = sum_over_processes(accelerator, totals)
    return totals[:2] / totals[2].clamp(min=1)


def rotate_responses(
    batches: Sequence[PairBatch], gather: Callable[[list[Any]], list[Any]] = list, rank: int = 0
) -> list[PairBatch]:
    """The same pairs, with each prompt followed by the responses of the next pair, rotating over all the batches.

    KTO estimates its divergence on these (arXiv 2402.01306: x_i with y_j, j = i + 1 modulo their number). The batches
    keep their sizes. `gather` concatenates the lists of all processes; pairs then follow one another as they would in
    one process. A single pair has no other responses: its batch is a dummy.
    """
    rows = [[{key: e[key] for key in (*_TOKENS, STATE) if key in e} for e in batch.examples] for batch in batches]
    firsts = gather([[None if batch.dummy else row[0] for batch, row in zip(batches, rows, strict=True)]])
    order = sorted((step, process) for process, steps in enumerate(firsts) for step, first in enumerate(steps) if first)
    successors = dict(zip(order, order[1:] + order[:1], strict=True))
    rotated = []
    for step, (batch, examples) in enumerate(zip(batches, rows, strict=True)):
        if batch.dummy or (len(order) == 1 and len(examples) == 1):
            rotated.append(batch.select([0], dummy=True))
            continue
        next_step, next_process = successors[step, rank]
        following = [*examples[1:], firsts[next_process][next_step]]
        pairs = zip(examples, following, strict=True)
        columns = ("prompt_ids", STATE)
        rotated.append(
            PairBatch([{**later, **{key: e[key] for key in columns if key in e}} for e, later in pairs], batch.pad)
        )
    return rotated
