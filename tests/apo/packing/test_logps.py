"""Log-probs of responses: by hand, then the fast batch against the plain one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from apo.packing.batch import PairBatch, unstack
from apo.packing.logps import padded_logps, plain_logps, response_logps
from tests.apo.conftest import make_model

collate = DataCollatorForPreference(pad_token_id=0)
ids = st.lists(st.integers(1, 39), min_size=1, max_size=6)
examples = st.lists(
    st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}), min_size=1, max_size=4
)


def test_a_response_by_hand():
    # Two tokens follow token 0: after it P = (1/2, 1/4, 1/4), after token 1 P = (1/8, 1/8, 3/4).
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [1.0, 1.0, 1.0]]]).log()
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    tokens, everything = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.long)
    both = response_logps(model, tokens, everything, torch.tensor([[0, 1, 1]]))
    assert both.item() == pytest.approx(math.log(0.25) + math.log(0.75))
    last = response_logps(model, tokens, everything, torch.tensor([[0, 0, 1]]))
    assert last.item() == pytest.approx(math.log(0.75))


@given(examples)
def test_the_fused_batch_agrees_with_the_plain_reference(examples):
    model = make_model()
    batch = collate(examples)
    plain = plain_logps(model, batch)
    add_fused_lm_head(model)
    fused = padded_logps(model, batch)
    for actual, expected in zip(fused[:4], plain[:4], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert plain.chosen_len.tolist() == [len(example["chosen_ids"]) for example in examples]
    assert plain.rejected_len.tolist() == [len(example["rejected_ids"]) for example in examples]


def test_gradients_of_the_fused_batch_agree_with_the_plain_reference():
    batch = collate([{"prompt_ids": [1, 5, 7], "chosen_ids": [9, 3], "rejected_ids": [12, 13, 14, 3]}] * 2)
    plain, fused = make_model(), make_model()
    add_fused_lm_head(fused)
    plain_logps(plain, batch).chosen.sum().backward()
    padded_logps(fused, batch).chosen.sum().backward()
    for actual, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6)


@given(examples)
def test_a_stacked_batch_can_be_taken_apart_again(examples):
    assert unstack(collate(examples)) == examples


def test_selecting_pairs_keeps_both_halves_together():
    given = {"input_ids": torch.arange(6)[:, None], "score": torch.tensor([0.0, 1.0, 2.0])}
    examples = [{"ref_chosen_logps": float(n), "ref_rejected_logps": -float(n), "pair_weight": n} for n in range(3)]
    chosen = PairBatch(examples, collate, given).select([2, 0])
    assert chosen["input_ids"].flatten().tolist() == [2, 0, 5, 3]
    assert chosen["score"].tolist() == [2.0, 0.0]
    assert [logps.tolist() for logps in chosen.reference] == [[2.0, 0.0], [-2.0, 0.0]]
    assert chosen.weights.tolist() == [2.0, 0.0]
    dummy = chosen.select([0, 1], dummy=True).select([1])  # as it is split into passes
    assert dummy.dummy
    assert dummy.weights.tolist() == [0.0]
