"""Fused norms and gated MLPs: the values and gradients of the plain ones, in fewer stored bytes, and no trace."""

from __future__ import annotations

import pytest
import torch

from apo.packing.fused import restore_plain, use_fused
from tests.apo.packing.packing_models import FAMILIES, tiny

KINDS = ("RMSNorm", "MLP")


def modules(model):
    """One module of each class that can be fused."""
    found = {type(module).__name__: module for module in model.modules() if type(module).__name__.endswith(KINDS)}
    assert {next(kind for kind in KINDS if name.endswith(kind)) for name in found} == set(KINDS)
    return found.values()


def is_fused(module):
    return "forward" in vars(module)


def run(module, x, grad):
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = module(x)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_modules_give_the_values_and_gradients_of_plain_ones(family, dtype, monkeypatch):
    monkeypatch.setattr("apo.packing.fused._CHUNK", 200)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(4)
    model = tiny(family)
    for parameter in model.parameters():  # norms of ones would hide a weight that is left out
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    use_fused(model)
    for module in modules(model):
        assert is_fused(module)
        module.to(dtype)
        size = module.weight.shape[-1] if hasattr(module, "weight") else module.gate_proj.in_features
        x, grad = (torch.randn(2, 9, size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        fused = run(module, x, grad)
        restore_plain(module)
        assert not is_fused(module)
        # Gemma's norms compute in float32 whatever they are given.
        rounds = dtype == torch.float32 or type(module).__name__.endswith("RMSNorm")
        tolerance = 2e-5 if rounds else 1e-12
        for ours, plain in zip(fused, run(module, x, grad), strict=True):
            torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_other_types_and_modules_that_compute_something_else_stay_plain():
    model = tiny()
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    x = torch.randn(1, 4, 32)
    use_fused(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16

    class ScaledRMSNorm(type(norm)):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class LastMLP(type(mlp)):
        def forward(self, x):
            return x + super().forward(x)

    others = torch.nn.ModuleList([ScaledRMSNorm(32), LastMLP(model.config)])
    use_fused(others)
    assert not any(map(is_fused, others))


def test_a_fused_mlp_stores_its_two_projections_alone():
    mlp = tiny().model.layers[0].mlp
    x, stored = torch.randn(1, 40, 32), []
    for fuse in (False, True):
        if fuse:
            use_fused(mlp)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = mlp(x)
        stored.append(sum(tensor.shape[-1] == 48 and tensor.shape[-2] == 40 for tensor in sizes.values()))
        out.sum().backward()
    assert stored == [4, 2]
