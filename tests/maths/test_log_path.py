"""The grid of distilled Proteina, and conversions at its levels."""

from __future__ import annotations

import itertools

import pytest
import torch

from fewstep.maths.log_path import LogFlowPath
from fewstep.maths.sde import langevin_step
from fewstep.maths.variables import score_from_velocity, x0_from_velocity
from tests.pipelines.proteins import TABLE


def begun(t: float = 10**-0.15) -> LogFlowPath:
    """The path from its first level on."""
    return LogFlowPath(t_max=t, zero_signal=True)


@pytest.mark.parametrize("steps", TABLE)
def test_levels_are_those_of_the_paper(steps):
    """t_i = 10^(-k_i / 200), k from 30 to 400, to the four digits that are printed."""
    levels = [begun().time(u) for u in begun().grid(steps)]
    assert [f"{t:.4f}"[1:] for t in levels] == TABLE[steps].split()


def test_ends_are_exact():
    """t_1 = 10^-.15, t_N = 10^-2; a grid of one level starts where it is told to."""
    u = begun().grid(16)
    assert begun().time(u[0]) == pytest.approx(10**-0.15) and begun().time(u[-1]) == pytest.approx(0.01)
    assert [begun(0.63).time(u) for u in begun(0.63).grid(1)] == [pytest.approx(0.63)]


def test_clock_and_time_are_inverse():
    """Over five decades."""
    u = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(LogFlowPath().clock(LogFlowPath().time(u)), u)


def test_velocity_score_and_clean_sample_say_the_same():
    """x0 = x - t v = x + (1 - tau) u; score = (tau u - x) / (1 - tau); weight 1 / t^2 on x0 is the velocity's error."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, guess = torch.randn(3, 5, 4, 3, generator=generator, dtype=torch.float64)
    t = torch.full((5,), 0.3, dtype=torch.float64)
    x, path = 0.7 * x0 + 0.3 * eps, LogFlowPath()
    v, tau, u = eps - x0, 0.7, x0 - eps
    torch.testing.assert_close(x0_from_velocity(x, path.velocity(v, x, t), t), x0)
    torch.testing.assert_close(score_from_velocity(x, v, t), -eps / 0.3)
    torch.testing.assert_close((tau * u - x) / (1 - tau), -eps / 0.3)
    wrong = (x - guess) / 0.3
    torch.testing.assert_close(((guess - x0) ** 2).mean() / 0.3**2, ((wrong - v) ** 2).mean())


@pytest.mark.parametrize("renewal", [None, 0.5])
def test_langevin_steps_keep_the_marginals_of_a_gaussian(renewal):
    """Data of standard deviation .4: 400 small steps end within 2 % of it at noise scale 1, below it at .45."""
    spread, found = 0.4, []
    for variance in (1.0, 0.45):
        generator = torch.Generator().manual_seed(0)
        levels = [(10 ** (-2 * k / 400) - 0.01) / 0.99 for k in range(401)]
        x = torch.randn(20_000, generator=generator)
        for t, t_next in itertools.pairwise(levels):
            x0 = (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2) * x
            noise = torch.randn(x.shape, generator=generator)
            x = langevin_step(x, x0, torch.tensor(t), torch.tensor(max(t_next, 0.0)), noise, variance, renewal)
        found.append(x.std().item())
    assert found[0] == pytest.approx(spread, rel=0.02) and found[1] < 0.97 * spread


def test_few_levels_blow_up_without_renewal_where_data_has_no_freedom():
    """A coordinate that is always 0, as a bond's deviation nearly is: 16 Euler steps make it large, renewal keeps it small."""
    spreads = {}
    for renewal in (None, 0.5):
        generator = torch.Generator().manual_seed(1)
        levels = [(10 ** (-2 * k / 16) - 0.01) / 0.99 for k in range(17)]
        x = torch.randn(5_000, generator=generator)
        for t, t_next in itertools.pairwise(levels):
            noise = torch.randn(x.shape, generator=generator)
            x = langevin_step(x, 0 * x, torch.tensor(t), torch.tensor(max(t_next, 0.0)), noise, 0.45, renewal)
            before_last = x if t_next > 0.005 else None
            if before_last is not None:
                spreads[renewal] = x.std().item() / t_next
    assert spreads[None] > 5 and spreads[0.5] < 2
