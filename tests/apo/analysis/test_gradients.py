"""Gradients by the LM head in model families that scale or cap their logits."""

from __future__ import annotations

import pytest
import torch

from apo.analysis.features import last_hidden
from apo.analysis.gradients import head_gradients
from apo.packing.head import logit_scaling
from apo.packing.logps import plain_logps
from tests.apo.packing.packing_models import FAMILIES, pairs, stacked, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gradients_are_autograds_and_their_log_probs_the_models(family):
    model, examples = tiny(family), pairs((7, 0, 9, 14), (12, 3, 10, 13), (3, 0, 1, 1))
    for weight in model.parameters():  # large enough for the cap
        weight.data *= 4 if weight.dim() > 1 else 1
    gradients = dict(zip(("chosen_ids", "rejected_ids", "logps"), head_gradients(model, examples), strict=True))
    plain = plain_logps(model, stacked(examples))
    torch.testing.assert_close(gradients["logps"].chosen, plain.chosen.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients["logps"].rejected, plain.rejected.detach(), rtol=1e-5, atol=1e-4)
    head, (scale, softcap) = model.get_output_embeddings().weight, logit_scaling(model.config)
    for side in ("chosen_ids", "rejected_ids"):
        with torch.no_grad():
            states = last_hidden(model, [row["prompt_ids"] + row[side] for row in examples])
        for index, row in enumerate(examples):
            start, tokens = len(row["prompt_ids"]), torch.tensor(row[side])
            logits = states[index, start - 1 : start + len(tokens) - 1] @ head.T * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            logp = logits.log_softmax(-1)[range(len(tokens)), tokens].sum()
            (gradient,) = torch.autograd.grad(logp, head)
            torch.testing.assert_close(gradients[side][index], gradient.flatten(), rtol=1e-4, atol=1e-4)
