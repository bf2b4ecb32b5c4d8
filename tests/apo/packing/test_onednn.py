"""Products by oneDNN: as exact as torch's, used for certain numbers of rows alone, and removed without trace."""

from __future__ import annotations

import pytest
import torch

from apo.packing.layout import pack_pairs
from apo.packing.logps import plain_logps
from apo.packing.packed_model import disable_packing, enable_packing, packed_logps
from clair.inference.generation import onednn as matmul
from tests.apo.packing.packing_models import FAMILIES, SHAPES, gradients, packed, pairs, stacked, tiny


@pytest.fixture
def quick(monkeypatch):
    """A machine where oneDNN is the faster; the products that it made are counted."""
    if matmul.speeds()[1] == 0:
        pytest.skip("this torch has no oneDNN for this processor")
    monkeypatch.setattr(matmul, "speeds", lambda: (1.0, 2.0))
    products = []
    real = matmul._onednn
    monkeypatch.setattr(matmul, "_onednn", lambda a, b: products.append(a.shape) or real(a, b))
    return products


def layer(bias):
    torch.manual_seed(2)
    linear = torch.nn.Linear(48, 80, bias=bias)
    matmul.use_onednn(linear)
    return linear


def run(linear, x):
    x = x.clone().requires_grad_()
    out = linear(x)
    (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).square().sum().backward()
    results = [
        out.detach(),
        x.grad,
        linear.weight.grad.clone(),
        *([linear.bias.grad.clone()] if linear.bias is not None else []),
    ]
    linear.zero_grad()
    return results


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (2, 32, 48)])
def test_a_quick_layer_is_as_near_to_float64_as_torchs_own(quick, bias, shape):
    linear, x = layer(bias), torch.randn(*shape)
    ours = run(linear, x)
    assert len(quick) == 3  # forward, and backward to its input and to its weight
    matmul.restore_linear(linear)
    plain = run(linear, x)
    true = run(linear.double(), x.double())
    for actual, theirs, exact in zip(ours, plain, true, strict=True):
        assert (actual - exact).norm() <= 4 * (theirs - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_multiplied_in_float32_is_as_near_to_float64_as_torchs_own(mixed, monkeypatch):
    linear, x = layer(bias=True).bfloat16(), torch.randn(2, 32, 48).bfloat16()
    if mixed:
        linear, x = linear.float(), x.float()

    def results(native):
        monkeypatch.setattr(matmul, "has_bfloat16", lambda: native)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            assert (linear(x).grad_fn.name() == "_LinearBackward") == (not native)
            return run(linear, x)

    ours, plain = results(False), results(True)
    assert [value.dtype for value in ours] == [value.dtype for value in plain]
    for actual, theirs, exact in zip(ours, plain, run(linear.double(), x.double()), strict=True):
        assert (actual - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-7 * exact.norm()
    monkeypatch.setattr(matmul, "has_bfloat16", lambda: False)
    few_rows = linear.bfloat16()(x[0, :31].bfloat16())  # are faster as they are
    assert few_rows.grad_fn.name() != "_LinearBackward"


def test_other_rows_types_and_autocast_are_left_to_torch(quick):
    linear = layer(bias=True)
    rows = torch.randn(33, 48)
    assert torch.equal(linear(rows), torch.nn.functional.linear(rows, linear.weight, linear.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(rows[:32]).dtype == torch.bfloat16
    linear.bfloat16()(rows[:32].bfloat16())
    assert quick == []


def test_only_plain_linear_layers_are_quickened_and_nothing_of_it_stays():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = torch.nn.Sequential(torch.nn.Linear(3, 3), Scaled(3, 3), torch.nn.LayerNorm(3))
    matmul.use_onednn(layers)
    assert ["forward" in vars(linear) for linear in layers] == [True, False, False]
    matmul.restore_linear(layers)
    assert not any("forward" in vars(linear) for linear in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_quick_packed_rows_give_the_plain_log_probs_and_gradients(family, quick):
    model, batch = tiny(family), stacked(pairs(*SHAPES))
    plain = plain_logps(model, batch)
    expected = gradients(model, plain)
    assert quick == []
    enable_packing(model)
    actual = packed(model, pairs(*SHAPES))
    for ours, theirs in zip(actual[:4], plain[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-5)
    assert (gradients(model, actual) - expected).norm() < 1e-5 * expected.norm()
    assert len(quick) > 3 * 2 * 7  # forward and backward of every matrix of two layers
    disable_packing(model)
    quick.clear()
    plain_logps(model, batch)
    assert quick == []


def test_padding_of_a_packed_row_changes_nothing(quick):
    model, examples = tiny(), pairs(*SHAPES)
    enable_packing(model)
    filled = pack_pairs(examples, multiple=matmul.ROWS)
    assert filled.input_ids.shape[1] % matmul.ROWS == len(filled.predictors) % matmul.ROWS == 0
    bare = pack_pairs(examples)
    assert bare.input_ids.shape[1] % matmul.ROWS
    assert len(bare.predictors) % matmul.ROWS
    assert (filled.pairs, len(filled.labels)) == (bare.pairs, len(bare.labels))
    ours, theirs = packed_logps(model, filled), packed_logps(model, bare)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)
    unfilled = gradients(model, packed_logps(model, bare))
    assert (gradients(model, packed_logps(model, filled)) - unfilled).norm() < 1e-6 * unfilled.norm()


@pytest.mark.parametrize("measured", [(1.0, 0.0), (1.0, 1.1)])
def test_if_torchs_kernel_is_as_fast_nothing_is_padded_or_replaced(measured, quick, monkeypatch):
    monkeypatch.setattr(matmul, "speeds", lambda: measured)
    model = tiny()
    enable_packing(model)
    packed(model, pairs(*SHAPES))
    assert matmul.rows_multiple(torch.device("cpu")) == 1
    assert quick == []


def test_a_torch_without_onednn_has_no_speed_of_it(monkeypatch):
    def missing(a, b):
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(matmul, "_onednn", missing)
    plain, onednn = matmul.speeds.__wrapped__()
    assert plain > 0
    assert onednn == 0


def test_a_compiled_layer_is_left_to_the_compiler(quick):
    linear, x = layer(bias=True), torch.randn(64, 48)
    plain, count = run(linear, x), len(quick)
    compiled = torch.compile(linear, backend="eager")
    results = run(compiled, x)
    assert len(quick) == count == 3
    for actual, expected in zip(results, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
