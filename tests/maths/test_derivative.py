"""Derivatives in one scalar a row: exact forward mode, differences and their orders, edges, and what has no forward mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.derivative import derivative
from fewstep.models.dit import DIT
from fewstep.models.unet2d import UNET2D
from fewstep.nets.extra_inputs import feeding

F64 = torch.float64
AT = torch.linspace(0, 1, 9, dtype=F64)


def wave(s: Tensor) -> Tensor:
    """sin(3 s) and s^3: [rows, 2]."""
    return torch.stack([(3 * s).sin(), s**3], 1)


def slope(s: Tensor) -> Tensor:
    return torch.stack([3 * (3 * s).cos(), 3 * s**2], 1)


def test_forward_mode_is_exact():
    value, found = derivative(wave, AT)
    torch.testing.assert_close(value, wave(AT), rtol=0, atol=0)
    torch.testing.assert_close(found, slope(AT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how, order", [("central", 2), ("backward", 1)])
def test_differences_have_their_order(how, order):
    """Inside the range, halving h divides the error by 2^order."""
    inside = AT[2:-2]
    errors = [(derivative(wave, inside, how, h)[1] - slope(inside)).abs().max().item() for h in (0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_at_the_ends_a_difference_is_divided_by_the_gap_that_is_left():
    """Central is one-sided there, so a straight line comes out exact at 0, at `high` and between; nothing is asked outside."""
    seen = []

    def line(s: Tensor) -> Tensor:
        seen.append(s)
        return (5 * s - 2)[:, None]

    at = torch.tensor([0.0, 0.001, 0.4, 0.799, 0.8], dtype=F64)
    for how, rows in (("central", slice(None)), ("backward", slice(1, None))):
        found = derivative(line, at, how, h=0.01, high=0.8)[1]
        torch.testing.assert_close(found[rows], torch.full_like(found[rows], 5.0), rtol=1e-9, atol=0)
    assert derivative(line, at, "backward", h=0.01)[1][0] == 0  # no gap below 0
    assert torch.cat(seen[:-2]).min() >= 0 and torch.cat(seen[:-2]).max() <= 0.8


@pytest.mark.parametrize("how, calls", [("jvp", 1), ("central", 3), ("backward", 2)])
def test_number_of_calls_and_no_graph(how, calls):
    weight, counted = torch.ones(1, requires_grad=True), []

    def f(s: Tensor) -> Tensor:
        counted.append(1)
        return wave(s) * weight.to(F64)

    value, found = derivative(f, AT, how)
    assert len(counted) == calls
    assert not value.requires_grad and not found.requires_grad


@pytest.mark.parametrize(
    "family, sizes",
    [
        (UNET2D, {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4}),
        (DIT, {"sample_size": 8, "classes": 10, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}),
    ],
)
def test_forward_mode_equals_central_difference_through_a_real_network(family, sizes):
    """FreeFlow's property 6, rtol 1e-3 in float32: through attention, group norm and the hooks of the added input."""
    torch.manual_seed(0)
    module = family.upgrade(family.build(**sizes).module.eval(), ("delta",))
    for p in module.extra_inputs.parameters():
        nn.init.normal_(p, std=0.1)
    x, t, label = torch.randn(6, 1, 8, 8), torch.full((6,), 1000.0), torch.arange(6)

    def f(delta: Tensor) -> Tensor:
        said = Cond(label=label, delta=delta)
        with feeding(module, said):
            return family.unpack(module, module(**family.pack(module, x, t, said)), x)

    delta = torch.linspace(0.1, 0.9, 6)
    exact, near = derivative(f, delta)[1], derivative(f, delta, "central", h=1e-3)[1]
    assert exact.norm() > 1e-2
    assert (exact - near).norm() / exact.norm() < 1e-3


class _Twice(torch.autograd.Function):
    """2 x, without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def _cut(s: Tensor) -> Tensor:
    return s.detach()[:, None]


@pytest.mark.parametrize("f, named", [(lambda s: _Twice.apply(s)[:, None], "jvp"), (_cut, "drops the tangent")])
def test_a_network_without_forward_mode_is_named_with_the_way_out(f, named):
    with pytest.raises(UserError, match=f"{named}.*write config.derivative: central"):
        derivative(f, AT)
    assert derivative(f, AT, "central")[1].shape == (9, 1)


def test_an_error_of_the_network_itself_is_not_hidden():
    with pytest.raises(RuntimeError, match="shape"):
        derivative(lambda s: s @ torch.ones(3, 3, dtype=F64), AT)
