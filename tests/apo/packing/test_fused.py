"""Fused norms and gated MLPs: the values and gradients of the plain ones, in fewer stored bytes, and no trace."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from apo.packing.fused import restore_plain, use_fused
from clair.inference.generation.onednn import use_onednn
from tests.apo.packing.packing_models import FAMILIES, tiny

KINDS = ("RMSNorm", "MLP")


def modules(model):
    """One module of each class that can be fused."""
    found = {type(module).__name__: module for module in model.modules() if type(module).__name__.endswith(KINDS)}
    assert {next(kind for kind in KINDS if name.endswith(kind)) for name in found} == set(KINDS)
    return found.values()


def is_fused(module):
    return "forward" in vars(module)


def run(module, x, grad, call=None):
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = (call or module)(x)
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


def saved_by(call, *shape):
    """How many tensors of a shape the backward pass of a call keeps, and the call's output."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    return sum(tensor.shape[-2:] == shape for tensor in kept.values()), out


def fuse(module):
    use_onednn(module)
    use_fused(module)


def test_a_fused_mlp_stores_its_two_projections_alone():
    mlp = tiny().model.layers[0].mlp
    x = torch.randn(1, 40, 32)
    assert saved_by(lambda: mlp(x), 40, 48)[0] == 4
    fuse(mlp)
    assert saved_by(lambda: mlp(x), 40, 48)[0] == 2


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_linear_layers_after_a_fused_norm_do_not_store_their_input(adapter):
    model = tiny()
    if adapter:
        targets = ["q_proj", "k_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).get_base_model()
    layer = model.model.layers[0]
    norm, attention = layer.input_layernorm, layer.self_attn
    projections = torch.nn.ModuleList([attention.q_proj, attention.k_proj, attention.v_proj])
    x = torch.randn(1, 40, 32, requires_grad=True)  # as in every layer but the first
    trained = [p for p in (norm.weight, *projections.parameters()) if p.requires_grad]
    for parameter in trained:
        parameter.data += 0.1 * torch.randn(parameter.shape)  # an adapter's B is 0, and its A then without gradient

    def project():
        hidden = norm(x)
        return sum(projection(hidden).sin().sum() for projection in projections)

    def gradients(loss):
        return torch.autograd.grad(loss, [x, *trained])

    use_fused(layer)
    plain, loss = saved_by(project, 40, 32)
    expected = gradients(loss)
    use_onednn(layer)
    fewer, loss = saved_by(project, 40, 32)
    assert plain - fewer == 1
    for ours, theirs in zip(gradients(loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_activation_checkpointing_keeps_nothing_of_a_fused_mlp():
    mlp = tiny().model.layers[0].mlp
    x, grad = torch.randn(1, 64, 32), torch.randn(1, 64, 32)
    expected = run(mlp, x, grad)
    fuse(mlp)
    projections = []
    mlp.gate_proj.register_forward_hook(lambda *call: projections.append(StorageWeakRef(call[2].untyped_storage())))

    def checkpointed(x):
        out = checkpoint(mlp, x, use_reentrant=False)
        assert all(projection.expired() for projection in projections)
        return out

    for ours, theirs in zip(run(mlp, x, grad, checkpointed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert len(projections) == 2  # the second in the backward pass
