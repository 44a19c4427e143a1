"""Shifts and time samplers."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.maths.clocks import discrete, dynamic_mu, dynamic_shift, logit_normal, shift, uniform, unshift

U = torch.linspace(0, 1, 1001, dtype=torch.float64)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 6.0])
def test_unshift_inverts_shift(factor):
    assert torch.allclose(unshift(shift(U, factor), factor), U, atol=1e-14, rtol=0)
    assert shift(0.0, factor) == 0.0
    assert shift(1.0, factor) == 1.0


def test_shift_three_on_four_levels_gives_the_published_grid():
    assert [shift(u, 3.0) for u in (1.0, 0.75, 0.5, 0.25)] == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=1e-15)


def test_dynamic_mu_is_the_line_of_the_flux_pipeline():
    assert dynamic_mu(256) == pytest.approx(0.5)
    assert dynamic_mu(4096) == pytest.approx(1.15)
    assert dynamic_mu(1024) == pytest.approx(0.5 + 0.65 * 768 / 3840, abs=1e-12)
    assert dynamic_mu(8192, max_tokens=8192, largest=0.9) == pytest.approx(0.9)


def test_dynamic_shift_is_the_exponential_shift_of_the_flow_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    mu = dynamic_mu(1024)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    assert [dynamic_shift(u, mu) for u in sigmas] == pytest.approx(scheduler.sigmas[:4].tolist(), abs=1e-6)
    assert dynamic_shift(0.3, mu) == pytest.approx(shift(0.3, math.exp(mu)))


def test_uniform_fills_its_interval_evenly():
    drawn = uniform(U, 0.02, 0.98)
    assert (drawn[0].item(), drawn[-1].item()) == pytest.approx((0.02, 0.98))
    assert torch.allclose(drawn.diff(), drawn.diff().mean().expand(1000), atol=1e-14)


def test_logit_normal_has_its_mean_and_spread_in_the_logit():
    z = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logit = torch.logit(logit_normal(z, mean=-0.4, std=1.3))
    assert torch.allclose(logit, -0.4 + 1.3 * z, atol=1e-10)


def test_discrete_draws_every_integer_timestep_equally_often():
    u = (torch.arange(5000, dtype=torch.float64) + 1) / 5000  # (0, 1], the range of uniform draws
    k = (discrete(u, 1000) * 1000).round().long()
    counts = torch.bincount(k, minlength=1000)
    assert len(counts) == 1000
    assert counts.min() >= 4
    assert counts.max() <= 6
