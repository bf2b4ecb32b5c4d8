"""The three ways a packed row attends are one: same values, same gradients."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn.attention import flex_attention, varlen
from torch.nn.functional import scaled_dot_product_attention

from apo import attention, prefix
from apo.logps import plain_logps
from apo.prefix import lay_out, packed_logps, share_prefixes
from tests.apo.test_prefix import FAMILIES, SHAPES, gradients, pairs, stacked, tiny


def causal_from_the_end(query, key, value, begins, ends, longest_query, longest_key, *, scale, window_size, enable_gqa):
    """What `varlen_attn` computes, sequence by sequence: the kernel itself runs on a GPU only."""
    assert begins.dtype == ends.dtype == torch.int32
    lengths = [(b - a).tolist() for a, b in ((begins[:-1], begins[1:]), (ends[:-1], ends[1:]))]
    assert (longest_query, longest_key) == (max(lengths[0]), max(lengths[1]))
    parts = []
    for number, (queries, keys) in enumerate(zip(*lengths, strict=True)):
        q = query[begins[number] :][:queries].transpose(0, 1)
        k, v = (t[ends[number] :][:keys].transpose(0, 1) for t in (key, value))
        behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        seen = (behind >= 0) & ((behind <= window_size[0]) if window_size[0] >= 0 else True)
        done = scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(done[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    # FlexAttention computes gradients on a CPU when it is not compiled, but refuses to be asked.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(varlen, "varlen_attn", causal_from_the_end)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("way", "family"),
    [("flex", family) for family in FAMILIES] + [("varlen", f) for f in FAMILIES if "soft cap" not in f],
)
def test_every_way_gives_the_plain_log_probs_and_gradients(way, family):
    model, batch = tiny(family), stacked(pairs(*SHAPES))
    plain = plain_logps(model, batch)
    expected = gradients(model, plain)
    share_prefixes(model, way)
    layout = lay_out(pairs(*SHAPES))
    found = packed_logps(model, layout)
    assert layout.way == way
    torch.testing.assert_close(found[:2], plain[:2], rtol=1e-5, atol=1e-4)
    assert (gradients(model, found) - expected).norm() < 1e-5 * expected.norm()


def test_the_fastest_way_that_works_is_taken_and_the_others_are_told(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    config = types.SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    layout = lay_out(pairs(*SHAPES))
    assert attention.fastest(config, layout, torch.float32) == ("split", "")  # on a CPU nothing is measured

    def broken(*_):
        raise RuntimeError("no kernel image\nis available")

    def slow(*given):
        return sum(attention._split(*given) for _ in range(20))

    monkeypatch.setattr(attention, "WAYS", {"varlen": broken, "flex": slow, "split": attention._split})
    best, told = attention._measured(config, layout, torch.float32, 3)
    assert best == "split"
    assert "varlen cannot (no kernel image is available)" in told
    assert told.endswith("taken: split")


def test_a_way_that_disagrees_is_not_taken(monkeypatch):
    model, batch = tiny(), stacked(pairs(*SHAPES))
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    wrong = lambda *given: attention._split(*given) * 1.1  # noqa: E731
    monkeypatch.setitem(attention.WAYS, "flex", wrong)
    monkeypatch.setattr(prefix, "fastest", lambda *_: ("flex", "flex 1 ms; taken: flex"))
    reason, notes = prefix.share_if_exact([model], batch, batch, torch.float32)
    assert reason is None
    assert notes[-1] == "attention of packed rows: flex is not taken, its log-probs differ in packed rows"
    layout = lay_out(pairs(*SHAPES))
    packed_logps(model, layout)
    assert layout.way == "split"


def test_how_near_packed_rows_must_come_is_a_matter_of_what_products_are_in(monkeypatch):
    plain = prefix.PairLogps(*(torch.tensor([-1000.0]) for _ in range(2)), *(torch.tensor([500]) for _ in range(2)))
    near = plain._replace(chosen=plain.chosen * 1.001)
    monkeypatch.setattr(prefix, "shared_prefix_logps", lambda *_: near)
    model = tiny()
    assert model.dtype == torch.float32, "as the weights of mixed precision are"
    assert prefix.agrees(model, {}, plain, torch.bfloat16)
    assert not prefix.agrees(model, {}, plain, torch.float32)
