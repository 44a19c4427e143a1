"""RCGM in closed form (Cheng et al., arXiv 2512.05150, section 2): data N(m, s^2) with m = 1, s = .5.

With a(t)^2 = (1-t)^2 s^2 + t^2 the flow leads from x at t to X(x, t, r) = (1-r) m + a(r)/a(t) (x - (1-t) m), and the exact
average velocity is V* = (x - X) / (t - r).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.maths.paths import expand
from fewstep.maths.rcgm import enhanced, gap_weight, limited, metric_rows, residual, roll_out, split

M, S, F64 = 1.0, 0.5, torch.float64


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def spread(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return -M + (t - (1 - t) * S**2) / spread(t) ** 2 * (x - (1 - t) * M)


def exact(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """V*, and the velocity itself where r = t."""
    end = (1 - r) * M + spread(r) / spread(t) * (x - (1 - t) * M)
    return torch.where(t > r, (x - end) / (t - r).clamp_min(1e-12), velocity(x, t))


def held(x: Tensor, t: Tensor, s: Tensor, step: float, order: int, average: Callable = exact) -> Tensor:
    """The residual of V* under the marginal velocity."""
    v = velocity(x, t)
    way = roll_out(average, x - step * v, split(torch.maximum(t - step, s), s, order))
    return residual(exact(x, t, s), way, v, t, s, step)


# 1: the closed form this file stands on


def test_the_exact_average_velocity_is_that_of_the_gaussian_transport():
    """Property 1: V*(1.3, .8, .2) = -.183617, V*(.2, 1, 0) = -.9; v = .269231 and -.8; V*(x, t, t - h) -> v."""
    x, t, s = rows(1.3, 0.2), rows(0.8, 1.0), rows(0.2, 0.0)
    torch.testing.assert_close(exact(x, t, s), rows(-0.183617, -0.9), rtol=0, atol=1e-6)
    torch.testing.assert_close(velocity(x, t), rows(0.269231, -0.8), rtol=0, atol=1e-6)
    assert (x - (t - s) * exact(x, t, s))[0].item() == pytest.approx(1.410170, abs=1e-6)
    torch.testing.assert_close(exact(x, t, t - 1e-5), velocity(x, t), rtol=0, atol=1e-4)


# 2: the roll-out


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_a_roll_out_with_the_exact_average_is_the_whole_way(order):
    """Property 2: I = (t - s) V* = -.110170 for any number of segments, evenly spaced or not."""
    x, t, s = rows(1.3), rows(0.8), rows(0.2)
    drawn = [rows(0.3)] * (order - 1)
    for levels in (split(t, s, order), split(t, s, order, drawn)):
        assert len(levels) == order + 1
        torch.testing.assert_close(roll_out(exact, x, levels), rows(-0.110170), rtol=0, atol=1e-6)


def test_even_levels_are_equally_far_apart_and_drawn_ones_decrease_within_the_interval():
    even = torch.stack(split(rows(0.8, 0.5), rows(0.2, 0.5), 3))
    torch.testing.assert_close(even[:, 0], rows(0.8, 0.6, 0.4, 0.2))
    assert (even[:, 1] == 0.5).all()
    drawn = split(rows(0.8), rows(0.2), 3, [rows(0.5), rows(0.25)])
    torch.testing.assert_close(torch.cat(drawn), rows(0.8, 0.5, 0.275, 0.2))
    assert all(a > b for a, b in pairwise(drawn))


# 3, 4: the residual and what it pins


@pytest.mark.parametrize("step, expected", [(0.1, -0.022939), (0.01, -0.001848), (0.001, -0.000181)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_residual_at_the_exact_average_is_of_the_order_of_the_step(step, expected, order):
    """Property 3: at (1.3, .8, .2), for any N."""
    assert held(rows(1.3), rows(0.8), rows(0.2), step, order).item() == pytest.approx(expected, abs=2e-6)


def test_the_residual_of_the_whole_way():
    """Property 3: at (.2, 1, 0) and D = .01, -1.275e-4."""
    assert held(rows(0.2), rows(1.0), rows(0.0), 0.01, 2).item() == pytest.approx(-1.275e-4, abs=1e-6)


def test_the_residual_is_that_of_meanflow_in_the_limit():
    """For any network V: ((t - s) V - I) / D - v -> d/dt [(t - s) V] - v along the path, as D falls, at order 1."""

    def network(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return torch.sin(2 * x + t) + s * x

    x, t, s, v = rows(0.7), rows(0.6), rows(0.1), rows(-0.4)
    ahead, behind = ((t + h - s) * network(x + h * v, t + h, s) for h in (1e-6, -1e-6))
    expected = (ahead - behind) / 2e-6 - v
    errors = []
    for step in (1e-2, 1e-3):
        way = roll_out(network, x - step * v, split(t - step, s, 1))
        errors.append((residual(network(x, t, s), way, v, t, s, step) - expected).abs().item())
    assert errors[1] < 2e-3 and errors[0] / errors[1] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("step, slope", [(0.1, 0.43078), (0.02, 0.48540), (0.01, 0.49265), (0.005, 0.49631)])
def test_the_fixed_point_of_the_whole_way_is_explicit_euler_in_steps_of_d(step, slope):
    """Property 4: V(x, t, s) = D/(t-s) v + (1 - D/(t-s)) V^-(x - D v, t - D, s) on and on; the generator's slope is not
    s = .5 but Euler's, its mean exactly m."""

    def fixed(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The average that has no residual against itself: Euler's way."""
        y, level = x, t
        while (level > s + 1e-9).any():
            y, level = y - step * velocity(y, level), level - step
        return (x - y) / (t - s)

    x, t, s = rows(0.0, 1.0), rows(1.0, 1.0), rows(0.0, 0.0)
    v = velocity(x, t)
    way = roll_out(fixed, x - step * v, split(t - step, s, 1))
    assert residual(fixed(x, t, s), way, v, t, s, step).abs().max() < 1e-9
    low, high = (x - fixed(x, t, s)).tolist()
    assert high - low == pytest.approx(slope, abs=1e-5) and low == pytest.approx(M, abs=1e-12)


def test_gaps_below_the_step_are_flow_matching_to_the_bit():
    """Property 4, and no division by the gap: the residual is V - v, with finite gradients at t = s."""
    t, s = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.5, 0.495, 0.3])
    answer, v = torch.randn(3, 4), torch.randn(3, 4)
    found = residual(answer, torch.full((3, 4), float("nan")), v, t, s, 0.01)
    assert torch.equal(found[:2], (answer - v)[:2]) and found[2].isnan().all()
    answer.requires_grad_()
    residual(answer, torch.zeros(3, 4), v, t, s, 0.01).sum().backward()
    torch.testing.assert_close(answer.grad[:, 0], torch.tensor([1.0, 1.0, 20.0]))


# 5, 6: clamp, weights, metric


def test_the_clamp_moves_what_is_learned_from_the_mean_to_the_median():
    """Property 5: P(x0 = -1) = .8, P(x0 = 1) = .2 at t = s = 1. With V - eps = -u the residual is u's distance from x0;
    it has no mean at u = -.6, the mean of the data, and clamped none at u = -.75."""
    x0, weight = rows(1.0, -1.0), rows(0.8, 0.2)

    def zero(limit: float | None) -> float:
        grid = torch.linspace(-1, 1, 200_001, dtype=F64)
        pulls = (weight[:, None] * limited(grid + x0[:, None], limit)).sum(0)
        return grid[pulls.abs().argmin()].item()

    assert zero(1.0) == pytest.approx(-0.75, abs=1e-5)
    assert zero(None) == pytest.approx(-0.6, abs=1e-5)


def test_limits_hold_element_by_element():
    x = rows(-3.0, -0.5, 2.0)
    assert limited(x, 1.0).tolist() == [-1.0, -0.5, 1.0] and limited(x, None) is x


def test_rows_weigh_by_how_short_their_way_is():
    """Property 6: 1 at gap 1, 1.7265 at .5, 4.0777 at 0."""
    found = gap_weight(rows(1.0, 0.9, 0.3), rows(0.0, 0.4, 0.3))
    torch.testing.assert_close(found, rows(1.0, 1.7265, 4.0777), rtol=0, atol=1e-4)


def test_barron_has_a_gradient_of_unit_length_and_l2_one_of_twice_the_error():
    """Property 6: 2 diff / (n sqrt(mse + c^2)) with the factor taken as a constant; its value is about the row's rms."""
    a, b = torch.randn(3, 5, dtype=F64, requires_grad=True), torch.randn(3, 5, dtype=F64)
    mse = ((a - b) ** 2).mean(1).detach()
    (found,) = torch.autograd.grad(metric_rows(a, b, "barron").sum(), a)
    torch.testing.assert_close(found, 2 * (a - b) / 5 / (mse + 1e-6).sqrt()[:, None])
    torch.testing.assert_close(metric_rows(a, b, "barron"), mse.sqrt(), rtol=1e-5, atol=0)
    (plain,) = torch.autograd.grad(metric_rows(a, b, "l2").sum(), a)
    torch.testing.assert_close(plain, 2 * (a - b) / 5)
    same = metric_rows(a, a.detach(), "barron").sum()
    assert same == 0 and torch.autograd.grad(same, a)[0].abs().max() == 0


# 7: guidance


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("guide", ["self", "base", "base_datafree"])
def test_what_is_learned_is_guided_by_the_usual_scale(guide, scale):
    """Property 7: regression on the enhanced velocity has its fixed point at v_u + w (v_c - v_u), whoever guides; from
    itself with zeta = 1 - 1/w by iteration: d <- 1 + zeta d comes to 2 at .5 and to 5 at .8."""
    true, free = rows(1.3).expand(1, 3), rows(0.3).expand(1, 3)
    learned = true
    for _ in range(400):
        learned = enhanced(true, learned if guide == "self" else true, free, rows(scale), guide)
    torch.testing.assert_close(learned - free, scale * (true - free))


def test_rows_are_guided_by_scales_of_their_own():
    """A scale of 1 outside of the interval changes nothing, or takes the base's conditional velocity where no data is."""
    v, tied, free = (torch.randn(2, 3, dtype=F64) for _ in range(3))
    for guide in ("self", "base"):
        assert torch.equal(enhanced(v, tied, free, rows(1.0, 4.0), guide)[0], v[0])
    torch.testing.assert_close(enhanced(v, tied, free, rows(1.0, 4.0), "base_datafree")[0], tied[0])


def test_times_multiply_states_of_any_shape():
    """Rows of images: the roll-out and the residual broadcast times over pixels."""
    x, t, s = torch.randn(2, 1, 4, 4, dtype=F64), rows(1.0, 0.7), rows(0.0, 0.2)

    def field(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return exact(y, expand(a, y), expand(b, y))

    v = velocity(x, expand(t, x))
    way = roll_out(field, x - 0.01 * v, split(t - 0.01, s, 2))
    found = residual(field(x, t, s), way, v, t, s, 0.01)
    assert found.shape == x.shape and 0 < found.abs().max() < 0.02 and math.isfinite(found.sum())
