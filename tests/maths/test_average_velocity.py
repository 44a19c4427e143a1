"""Average velocities of a Gaussian: jumps, landings, compositions, the slope along the path, and guided velocities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.maths.average_velocity import average_velocity, composed, guided_velocity, jump, landing, slope_along
from fewstep.maths.paths import FlowPath, expand

F64 = torch.float64
ROWS, MEAN, STD = 40, 0.7, 0.6


class Exact:
    """V(x, t, s) = (x - transport(x)) / (t - s) of N(mean, STD^2), and v at s = t; the null class has mean 0."""

    path = FlowPath()

    def __init__(self) -> None:
        self.told: list[Cond] = []

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.told.append(cond)
        t, s, mean = (expand(value, x) for value in (t, cond["s"], MEAN * cond["label"]))
        a, b = (((1 - time) ** 2 * STD**2 + time**2).sqrt() for time in (t, s))
        return -mean + ((t + s) - STD**2 * (2 - t - s)) / (a * (a + b)) * (x - (1 - t) * mean)

    def null(self, cond: Cond) -> Cond:
        return cond.with_(label=torch.zeros_like(cond["label"]))


def places() -> tuple[Tensor, Tensor, Tensor, Cond]:
    """x, t and s < t, conditions; float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=generator, dtype=F64)
    t = torch.linspace(0.05, 1, ROWS, dtype=F64)
    return x, t, t * torch.rand(ROWS, generator=generator, dtype=F64), Cond(label=torch.ones(ROWS, dtype=F64))


def transported(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """(1 - s) m + a(s) / a(t) (x - (1 - t) m)."""
    t, s = expand(t, x), expand(s, x)
    a, b = (((1 - time) ** 2 * STD**2 + time**2).sqrt() for time in (t, s))
    return (1 - s) * MEAN + b / a * (x - (1 - t) * MEAN)


def test_a_jump_is_the_transport_and_jumps_compose():
    x, t, s, cond = places()
    torch.testing.assert_close(jump(Exact(), x, t, s, cond), transported(x, t, s), rtol=0, atol=1e-13)
    middle = (t + s) / 2
    twice = jump(Exact(), jump(Exact(), x, t, middle, cond), middle, s, cond)
    torch.testing.assert_close(twice, transported(x, t, s), rtol=0, atol=1e-13)


def test_a_landing_told_zero_is_the_end_of_the_trajectory_and_told_t_the_posterior_mean():
    """x - t V(x, t, 0) = m + s (x - (1-t) m) / a, and x - t v = E[x0 | x_t]."""
    x, t, _, cond = places()
    end, mean = (landing(Exact(), x, t, s, cond) for s in (torch.zeros_like(t), t))
    torch.testing.assert_close(end, transported(x, t, torch.zeros_like(t)), rtol=0, atol=1e-13)
    variance = expand((1 - t) ** 2 * STD**2 + t**2, x)
    posterior = MEAN + expand(1 - t, x) * STD**2 / variance * (x - expand(1 - t, x) * MEAN)
    torch.testing.assert_close(mean, posterior, rtol=0, atol=1e-13)


def test_the_second_time_and_the_sign_travel_with_the_condition():
    network, (x, t, s, cond) = Exact(), places()
    average_velocity(network, x, t, s, cond)
    average_velocity(network, x, t, s, cond, sign=-torch.ones(ROWS))
    assert torch.equal(network.told[0]["s"], s) and "sign" not in network.told[0]
    assert torch.equal(network.told[1]["sign"], -torch.ones(ROWS)) and "s" not in cond


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_two_calls_compose_to_the_whole_mean_velocity(share):
    """(t - m) V(x, t, m) + (m - s) V(x_m, m, s) = (t - s) V(x, t, s); half-way both weigh alike."""
    network, (x, t, s, cond) = Exact(), places()
    middle = s + share * (t - s)
    found = composed(network, x, t, middle, s, cond)
    torch.testing.assert_close(found, average_velocity(Exact(), x, t, s, cond), rtol=0, atol=1e-12)
    assert [torch.equal(told["s"], at) for told, at in zip(network.told, (middle, s))] == [True, True]


def test_instant_rows_are_composed_of_two_euler_steps():
    network, (x, t, s, cond) = Exact(), places()
    middle, instant = (t + s) / 2, torch.arange(ROWS) % 2 == 0
    found = composed(network, x, t, middle, s, cond, instant)
    torch.testing.assert_close(found[1::2], average_velocity(Exact(), x, t, s, cond)[1::2], rtol=0, atol=1e-12)
    first = average_velocity(Exact(), x, t, t, cond)
    second = average_velocity(Exact(), x - expand(t - middle, x) * first, middle, middle, cond)
    torch.testing.assert_close(found[::2], ((first + second) / 2)[::2], rtol=0, atol=1e-12)


def test_the_slope_along_the_velocity_closes_the_mean_flow_identity():
    """V + (t - s) dV/dt = v with the derivative along v (arXiv 2505.13447, eq. 6); no other direction does."""
    x, t, s, cond = places()
    v, u = average_velocity(Exact(), x, t, t, cond), average_velocity(Exact(), x, t, s, cond)
    gap = expand(t - s, x)
    torch.testing.assert_close(u + gap * slope_along(Exact(), x, v, t, s, cond), v, rtol=0, atol=1e-12)
    assert (u + gap * slope_along(Exact(), x, v + 1, t, s, cond) - v).abs().max() > 0.1


def test_differences_of_the_slope_are_of_second_order():
    x, t, s, cond = places()
    v = average_velocity(Exact(), x, t, t, cond)
    exact = slope_along(Exact(), x, v, t, s, cond)
    coarse, fine = (
        (slope_along(Exact(), x, v, t, s, cond, "central", h) - exact)[3:-3].abs().max() for h in (4e-2, 2e-2)
    )
    assert coarse / fine == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("mix", [0.0, 0.6])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_velocities_follow_their_formula_in_one_call(scale, mix):
    """(1 - k) [w v + (1 - w) V(x, t, t, null)] + k V(x, t, t, cond)."""
    network, (x, t, _, cond) = Exact(), places()
    v = torch.ones_like(x)
    found = guided_velocity(network, x, v, t, cond, scale, mix)
    assert len(network.told) == 1
    free, tied = (average_velocity(Exact(), x, t, t, c) for c in (Exact().null(cond), cond))
    expected = (1 - mix) * (scale * v + (1 - scale) * free) + mix * tied
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
