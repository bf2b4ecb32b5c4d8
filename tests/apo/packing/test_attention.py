"""The three ways a packed row attends are one: same values, same gradients."""

from __future__ import annotations

import shutil
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention, varlen
from torch.nn.functional import scaled_dot_product_attention

from apo.packing import attention, flash_branches, flex, packed_model
from apo.packing.layout import pack_pairs
from apo.packing.logps import PairLogps, plain_logps
from apo.packing.packed_model import enable_packing, packed_logps
from tests.apo.packing.kernels import packed_row
from tests.apo.packing.packing_models import FAMILIES, SHAPES, batch_of, gradients, pairs, stacked, tiny


def causal_from_the_end(
    query, key, value, query_offsets, key_offsets, longest_query, longest_key, *, scale, window_size, enable_gqa
):
    """Compute `varlen_attn` sequence by sequence: the kernel itself runs on a GPU only."""
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype
    lengths = [
        (b - a).tolist() for a, b in ((query_offsets[:-1], query_offsets[1:]), (key_offsets[:-1], key_offsets[1:]))
    ]
    assert (longest_query, longest_key) == (max(lengths[0]), max(lengths[1]))
    outputs = []
    for number, (queries, keys) in enumerate(zip(*lengths, strict=True)):
        q = query[query_offsets[number] :][:queries].transpose(0, 1)
        k, v = (t[key_offsets[number] :][:keys].transpose(0, 1) for t in (key, value))
        behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        visible = (behind >= 0) & ((behind <= window_size[0]) if window_size[0] >= 0 else True)
        output = scaled_dot_product_attention(q[None], k[None], v[None], visible, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    # FlexAttention computes gradients on a CPU when it is not compiled, but its device check refuses.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(varlen, "varlen_attn", causal_from_the_end)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("backend", "family"),
    [("flex", family) for family in FAMILIES] + [("varlen", f) for f in FAMILIES if "soft cap" not in f],
)
def test_every_backend_gives_the_plain_log_probs_and_gradients(backend, family):
    model, batch = tiny(family), stacked(pairs(*SHAPES))
    plain = plain_logps(model, batch)
    expected = gradients(model, plain)
    enable_packing(model, backend)
    layout = pack_pairs(pairs(*SHAPES))
    actual = packed_logps(model, layout)
    assert layout.backend == backend
    torch.testing.assert_close(actual[:2], plain[:2], rtol=1e-5, atol=1e-4)
    assert (gradients(model, actual) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_every_backend_runs_in_mixed_precision(backend):
    # Rotated queries and keys come in float32, values in bfloat16: only SDPA mends that by itself.
    results = {}
    for taken in (backend, "split"):
        model = tiny("qwen3")
        enable_packing(model, taken)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = packed_logps(model, pack_pairs(pairs(*SHAPES)))
        results[taken] = torch.stack(logps[:2])
    torch.testing.assert_close(results[backend], results["split"], rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("heads", "window"), [((4, 4), None), ((6, 2), None), ((6, 2), 400)])
def test_the_flash_kernel_by_branches_is_attention_with_masks(dtype, heads, window, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    packed = packed_row([(70, 130, 300), (1, 1, 1), (20, 0, 5), (9, 6, 0), (33, 0, 0)])
    tokens = packed.spans[-1].bounds[-1]

    def draw(heads):  # as a projection gives it: heads within tokens
        states = torch.randn(1, tokens, heads, 16, generator=generator, dtype=torch.float64).to(dtype)
        return states.transpose(1, 2).requires_grad_()

    query, key, value = draw(heads[0]), draw(heads[1]), draw(heads[1])
    grad = torch.randn(query.shape, generator=generator, dtype=torch.float64).to(dtype)
    results = []
    for is_fast in (True, False):
        if not is_fast:
            monkeypatch.setattr(attention, "has_flash_branches", lambda *_: False)
        out = attention._split(query, key, value, packed, 0.3, 0.0, window, None)
        assert ("FlashBranches" in type(out.grad_fn).__name__) is is_fast
        results.append([out, *torch.autograd.grad(out, (query, key, value), grad)])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("window", "softcap", "dropout"), [(360, None, 0.0), (None, 20.0, 0.0), (None, None, 0.1)])
def test_windows_that_matter_soft_caps_and_dropout_are_computed_with_masks(window, softcap, dropout):
    packed = packed_row([(70, 130, 300)])
    states = torch.randn(1, 2, 500, 8, requires_grad=True)
    assert flash_branches.has_flash_branches(states, states, packed, 0.0, 370, None)
    out = attention._split(states, states, states, packed, 0.3, dropout, window, softcap)
    assert "FlashBranches" not in type(out.grad_fn).__name__


spans = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(spans, st.none() | st.integers(1, 500))
def test_blocks_hold_all_that_is_seen_and_whole_ones_nothing_else(shapes, window):
    layout = packed_row(shapes)
    mask, tokens = flex._block_mask(layout, window), layout.input_ids.shape[1]
    dense = torch.zeros(tokens, tokens, dtype=torch.bool)
    for span in layout.spans:  # by the sequences themselves
        start, middle, end, last = span.bounds
        for branch in ([*range(start, end)], [*range(start, middle), *range(end, last)]):
            behind = torch.arange(len(branch))[:, None] - torch.arange(len(branch))
            visible = (behind >= 0) & (behind < (window or tokens))
            dense[torch.tensor(branch)[:, None], torch.tensor(branch)] |= visible
    positions = torch.arange(tokens)
    assert torch.equal(mask.mask_mod(None, None, positions[:, None], positions), dense)
    full, some = (
        flex_attention._ordered_to_dense(number, which, mask.kv_indices.shape[-1])[0, 0].bool()
        for number, which in (
            (mask.full_kv_num_blocks, mask.full_kv_indices), (mask.kv_num_blocks, mask.kv_indices)
        )
    )  # fmt: skip
    assert not (full & some).any()
    over = full.shape[0] * flex.BLOCK - tokens
    counts = torch.nn.functional.pad(dense, (0, over, 0, over)).view(*(full.shape[0], flex.BLOCK) * 2).sum((1, 3))
    assert (counts[full] == flex.BLOCK**2).all()
    assert ((counts > 0) <= (full | some)).all()
    if window is None:
        assert torch.equal(counts > 0, full | some), "and no block more"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled by g++ on a CPU")
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, 20.0)])
def test_compiled_once_flexattention_is_split_on_rows_of_any_length(window, softcap):
    # Its forward pass, by the blocks: a compiled backward needs a GPU.
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True), pytest.MonkeyPatch.context() as patch:
        compiled = torch.compile(flex_attention.flex_attention, dynamic=True)
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
        patch.setattr(flex, "_flex_attention", lambda _: compiled)
        # torch's kernel for AVX2 alone gives wrong values for rows of 40 tokens, with its own causal mask too.
        short = (60, 40, 40) if torch.backends.cpu.get_cpu_capability() == "AVX2" else (20, 10, 10)
        for shapes in ([(130, 200, 300), (90, 0, 70)], [short], [(300, 120, 10), (200, 150, 260), (5, 9, 0)]):
            layout = packed_row(shapes)
            q, k, v = (torch.randn(1, heads, layout.input_ids.shape[1], 16) for heads in (4, 2, 2))
            actual, expected = (
                backend(q, k, v, layout, 0.25, 0.0, window, softcap) for backend in (flex.flex, attention._split)
            )
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_fastest_backend_that_works_is_chosen_and_the_others_are_reported(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    config = types.SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    layout = pack_pairs(pairs(*SHAPES))
    assert attention.fastest_backend(config, layout, torch.float32) == ("split", "")  # on a CPU nothing is measured

    def broken(*_):
        raise RuntimeError("no kernel image\nis available")

    def slow(*arguments):
        return sum(attention._split(*arguments) for _ in range(20))

    monkeypatch.setattr(attention, "BACKENDS", {"varlen": broken, "flex": slow, "split": attention._split})
    best, note = attention._measured(config, layout, torch.float32, 3)
    assert best == "split"
    assert "varlen failed (no kernel image is available)" in note
    assert note.endswith("selected: split")


def test_a_backend_that_disagrees_is_not_chosen(monkeypatch):
    model, batch = tiny(), batch_of(pairs(*SHAPES))
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    wrong = lambda *arguments: attention._split(*arguments) * 1.1  # noqa: E731
    monkeypatch.setitem(attention.BACKENDS, "flex", wrong)
    monkeypatch.setattr(packed_model, "fastest_backend", lambda *_: ("flex", "flex 1 ms; selected: flex"))
    reason, notes = packed_model.enable_packing_if_exact([model], batch, batch, torch.float32, torch.device("cpu"))
    assert reason is None
    assert notes[-1] == "attention of packed rows: flex is not used, its log-probs differ in packed rows"
    layout = pack_pairs(pairs(*SHAPES))
    packed_logps(model, layout)
    assert layout.backend == "split"


def test_how_near_packed_rows_must_come_is_a_matter_of_what_products_are_in(monkeypatch):
    plain = PairLogps(*(torch.tensor([-1000.0]) for _ in range(2)), *(torch.tensor([500]) for _ in range(2)))
    near = plain._replace(chosen=plain.chosen * 1.001)
    monkeypatch.setattr(packed_model, "packed_logps", lambda *_: near)
    model = tiny()
    assert model.dtype == torch.float32, "as the weights of mixed precision are"
    assert packed_model.matches_padded(model, {}, plain, torch.bfloat16)
    assert not packed_model.matches_padded(model, {}, plain, torch.float32)
