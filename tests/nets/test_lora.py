"""Adapters that are part of the call: views on one base, right under activation checkpointing, exact when merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.models.unet2d import UNET2D
from fewstep.nets.lora import Adapter, checkpointed, use


def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4}
    return UNET2D.build(**sizes).module.eval().requires_grad_(False)


def trained(module: nn.Module, seed: int, targets: tuple[str, ...] = ("*",)) -> Adapter:
    torch.manual_seed(seed)
    adapter = Adapter(module, rank=3, alpha=6.0, targets=targets)
    for up in adapter.up.values():
        nn.init.normal_(up.weight, std=0.1)
    return adapter


def run(module: nn.Module, seed: int = 0) -> torch.Tensor:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return module(x, torch.full((4,), 500.0), class_labels=torch.arange(4)).sample


def test_a_new_adapter_leaves_the_base_bit_exact():
    module = base()
    before = run(module)
    with use(Adapter(module, 4, 4.0, ["*"])):
        assert torch.equal(run(module), before)


def test_views_do_not_see_each_other():
    module = base()
    plain = run(module)
    a, b = trained(module, 1), trained(module, 2)
    with use(a):
        seen_a = run(module)
        with use(None):
            assert torch.equal(run(module), plain)
        with use(b):
            seen_b = run(module)
        assert torch.equal(run(module), seen_a)
    assert torch.equal(run(module), plain)
    assert (seen_a - seen_b).abs().max() > 1e-2 and (seen_a - plain).abs().max() > 1e-2


def test_merged_weights_equal_the_adapted_network():
    module = base()
    adapter = trained(module, 1)
    with use(adapter):
        expected = run(module)
    merged = copy.deepcopy(module)
    adapter.merge_into(merged)
    assert torch.allclose(run(merged), expected, atol=2e-5)
    assert not torch.allclose(run(module), expected, atol=1e-2), "merging must not touch the shared base"


def test_the_base_keeps_its_parameter_names():
    module = base()
    names = set(module.state_dict())
    trained(module, 1)
    assert set(module.state_dict()) == names


def gradients(module: nn.Module, first: Adapter, second: Adapter) -> list[torch.Tensor]:
    """Backward after another adapter was used: recomputation must not pick that one up."""
    with use(first):
        loss = run(module).square().sum()
    with use(second):
        run(module, seed=1)
        loss.backward()
    return [p.grad.clone() for p in first.parameters()]


def test_gradients_are_equal_with_and_without_checkpointing():
    plain_base = base()
    plain = gradients(plain_base, trained(plain_base, 1), trained(plain_base, 2))
    checkpointing = base().train()  # diffusers checkpoints in train mode only; this network has no dropout
    checkpointed(checkpointing)
    again = gradients(checkpointing, trained(checkpointing, 1), trained(checkpointing, 2))
    for expected, found in zip(plain, again):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(g.norm() for g in plain) > 0


def test_gradient_reaches_only_the_active_adapter():
    module = base()
    a, b = trained(module, 1), trained(module, 2)
    with use(a):
        run(module).square().sum().backward()
    assert all(p.grad is not None for p in a.parameters())
    assert all(p.grad is None for p in b.parameters())
    assert all(p.grad is None for p in module.parameters())


def test_targets_choose_layers_by_ending():
    module = base()
    adapter = trained(module, 1, ("to_q", "to_out.0"))
    assert adapter.down and all(key.endswith(("to_q", "to_out/0")) for key in adapter.down)


def test_no_matching_layer_is_an_error():
    with pytest.raises(UserError, match="no layer of UNet2DModel matches"):
        Adapter(base(), 4, 4.0, ["to_nowhere"])
