"""TrigFlow in flow variables: the change of variables, and the tangent of continuous-time consistency in both forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.maths.paths import TrigFlowPath, add_noise, expand
from fewstep.maths.trigflow import angle, consistency_tangent, flow_time, shaped, spread, trigflow

F64 = torch.float64
STDS = (0.5, 0.75, 1.0, 3.0)
ROWS, DIM = 33, 5


def rows(seed: int = 0) -> Tensor:
    """Normal rows [ROWS, DIM]."""
    return torch.randn(ROWS, DIM, dtype=F64, generator=torch.Generator().manual_seed(seed))


def times() -> Tensor:
    """Flow times with both ends."""
    return torch.linspace(0, 1, ROWS, dtype=F64)


# the change of variables


@pytest.mark.parametrize("std", STDS)
def test_angle_and_time_are_inverses_up_to_both_ends(std):
    """tan a = t / ((1-t) s); a = 0 and pi/2 are t = 0 and 1."""
    a = angle(times(), std)
    torch.testing.assert_close(flow_time(a, std), times(), rtol=0, atol=1e-15)
    assert a[0] == 0 and a[-1] == math.pi / 2
    torch.testing.assert_close(a[1:-1].tan(), (times() / (1 - times()) / std)[1:-1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("std", STDS)
def test_the_scaled_flow_state_is_the_papers_state(std):
    """s y / A = cos(a) x0 + sin(a) s n, and y / A has unit variance for data of std s."""
    x0, n, t = std * rows(), rows(1), times()
    a = expand(angle(t, std), x0)
    y, scale = add_noise(x0, n, t), expand(spread(t, std), x0)
    torch.testing.assert_close(std * y / scale, a.cos() * x0 + a.sin() * std * n, rtol=0, atol=1e-14)
    variance = ((1 - t) * std / spread(t, std)) ** 2 + (t / spread(t, std)) ** 2
    torch.testing.assert_close(variance, torch.ones_like(t), rtol=0, atol=1e-15)


@pytest.mark.parametrize("std", STDS)
def test_f_and_v_are_converted_back_and_forth_exactly(std):
    """To 1e-12, both ways, at every t with both ends."""
    forms, y, t = trigflow(std), rows(), expand(times(), rows())
    for value in (rows(1), 100 * rows(2)):
        there = forms.output(value, y, t)
        torch.testing.assert_close(forms.velocity(there, y, t), value, rtol=0, atol=1e-12 * value.abs().max().item())
        back = forms.velocity(value, y, t)
        torch.testing.assert_close(forms.output(back, y, t), value, rtol=0, atol=1e-12 * value.abs().max().item())


def test_for_unit_variance_it_is_the_conversion_of_sana_sprint_and_of_the_trigflow_path():
    """F = ((1-2t) y + (1-2t+2t^2) v) / sqrt(t^2 + (1-t)^2) (arXiv 2503.09641)."""
    y, v, t = rows(), rows(1), times()
    w = expand(t, y)
    found = trigflow(1.0).output(v, y, w)
    square = w**2 + (1 - w) ** 2
    torch.testing.assert_close(
        found, ((1 - 2 * w) * y + (1 - 2 * w + 2 * w**2) * v) / square.sqrt(), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(found, TrigFlowPath().output(v, y, t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("std", STDS)
def test_the_clean_prediction_is_the_same_in_both_worlds(std):
    """cos(a) x_a - sin(a) s F = y - t v; and a pair's own F is cos(a) n - sin(a) x0 / s."""
    forms, y, v, t = trigflow(std), rows(), rows(1), expand(times(), rows())
    a, scale = expand(angle(times(), std), y), spread(t, std)
    clean = a.cos() * std * y / scale - a.sin() * std * forms.output(v, y, t)
    torch.testing.assert_close(clean, y - t * v, rtol=0, atol=1e-13)
    x0, n = rows(2), rows(3)
    torch.testing.assert_close(forms.target(x0, n, t), a.cos() * n - a.sin() * x0 / std, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        forms.output(n - x0, add_noise(x0, n, times()), t), forms.target(x0, n, t), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("std", STDS)
def test_time_runs_with_the_angle_at_the_square_of_the_spread(std):
    """dt/da = A^2 / s, finite at both ends."""
    a = angle(times(), std).requires_grad_()
    (rate,) = torch.autograd.grad(flow_time(a, std).sum(), a)
    torch.testing.assert_close(rate, spread(times(), std) ** 2 / std, rtol=1e-12, atol=0)


# the tangent


def network(y: Tensor, t: Tensor) -> Tensor:
    """Some v(y, t) without structure."""
    t = t.reshape(-1, 1)
    return 0.7 * torch.sin(y.roll(1, 1) + 3 * t) + 0.4 * y * torch.cos(2 * t) - t**2


def by_the_paper(y: Tensor, moves: Tensor, t: Tensor, std: float, warm: float) -> Tensor:
    """-cos^2(a) (s F - dx/da) - r cos(a) sin(a) (x + s dF/da) with F as a TrigFlow network of (x, a)."""
    forms, a = trigflow(std), angle(t, std)

    def f(x: Tensor, b: Tensor) -> Tensor:
        s = expand(flow_time(b, std), x)
        flow_state = x * spread(s, std) / std
        return forms.output(network(flow_state, s[:, 0]), flow_state, s)

    x = std * y / expand(spread(t, std), y)
    dx = std * forms.output(moves, y, expand(t, y))  # the probability flow of the field: dx/da = s F
    value, slope = torch.func.jvp(f, (x, a), (dx, torch.ones_like(a)))
    c, s = expand(a.cos(), y), expand(a.sin(), y)
    return -(c**2) * (std * value - dx) - warm * c * s * (x + std * slope)


def in_flow(y: Tensor, moves: Tensor, t: Tensor, std: float, warm: float) -> Tensor:
    """The same from dv/dt."""
    v, slope = torch.func.jvp(network, (y, t), (moves, torch.ones_like(t)))
    return consistency_tangent(moves - v, slope, t, std, warm)


@pytest.mark.parametrize("warm", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("std", STDS)
def test_the_tangent_in_flow_variables_is_the_papers(std, warm):
    """Equal to 1e-10 for a network and a field without structure, at every time with both ends, at every warm-up."""
    y, moves, t = rows(), rows(1), times()
    expected = by_the_paper(y, moves, t, std, warm)
    torch.testing.assert_close(in_flow(y, moves, t, std, warm), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 0.5


@pytest.mark.parametrize("std", STDS)
def test_the_whole_tangent_is_the_slope_of_the_clean_prediction(std):
    """g = cos(a) df/da = (1-t) A (dy/dt - v - t dv/dt) at r = 1, and cos^2(a) A (dy/dt - v) at r = 0."""
    y, moves, t = rows(), rows(1), times()
    v, slope = torch.func.jvp(network, (y, t), (moves, torch.ones_like(t)))
    w, gap = expand(t, y), moves - v
    scale = spread(w, std)
    whole = (1 - w) * scale * (gap - w * slope)
    torch.testing.assert_close(consistency_tangent(gap, slope, t, std), whole, rtol=0, atol=1e-13)
    near = expand(angle(t, std).cos() ** 2, y) * scale * gap
    torch.testing.assert_close(consistency_tangent(gap, slope, t, std, 0.0), near, rtol=0, atol=1e-13)


@pytest.mark.parametrize("std", STDS)
def test_the_tangent_stays_finite_in_float32_at_both_ends(std):
    """s (dy/dt - v) at t = 0, nothing at t = 1; between them float32 agrees with float64 to 1e-5."""
    t = torch.tensor([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0])
    gap, slope = torch.ones(5, 2), 10 * torch.ones(5, 2)
    found = consistency_tangent(gap, slope, t, std)
    torch.testing.assert_close(found[:2], torch.full((2, 2), std), rtol=1e-5, atol=0)
    assert (found[-1] == 0).all() and found[-2].abs().max() < 1e-5
    wide = consistency_tangent(gap.double(), slope.double(), t.double(), std)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-6)


def test_what_is_done_to_the_tangent():
    """g / (|g| + c) of a row, g / (rms + c), clipped elements, or g; zero stays zero."""
    g = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.03, 0.04, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(shaped(g, "norm", 0.1)[0], g[0] / 5.1)
    torch.testing.assert_close(shaped(g, "norm", 0.1)[2], g[2] / 0.15)
    torch.testing.assert_close(shaped(g, "rms", 0.1)[0], g[0] / 2.6)
    assert shaped(g, "clip").tolist()[0] == [1.0, -1.0, 0.0, 0.0]
    assert torch.equal(shaped(g, "none"), g)
    assert all((shaped(g, shape)[1] == 0).all() for shape in ("norm", "rms", "clip", "none"))


def test_a_normed_tangent_is_never_longer_than_one():
    row = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    g = row * torch.logspace(-4, 6, 64)[:, None, None, None]
    lengths = shaped(g, "norm", 0.1).flatten(1).norm(dim=1)
    assert lengths.max() < 1 + 1e-6 and lengths.diff().min() > -1e-6 and lengths[0] < 0.01
    torch.testing.assert_close(shaped(g, "rms", 0.1).flatten(1).norm(dim=1)[-1], torch.tensor(48.0**0.5))
