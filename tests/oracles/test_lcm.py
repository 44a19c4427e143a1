"""LCM against the trajectories of a Gaussian and samples of a mixture, all exact."""

from __future__ import annotations

import pytest
import torch

from fewstep.maths.paths import FlowPath
from fewstep.methods.diffusion.lcm import LCM
from tests.oracles.harness import gaussian_wasserstein2, samples, seat, sliced_wasserstein2, train
from tests.oracles.ode_map import MEAN, STD, OdeMap, bias, data, gradients, teacher
from tests.oracles.students import distilled_mixture, true_samples


def lcm(levels: int = 48, student: OdeMap | None = None, **config) -> LCM:
    config = {"guidance_scale": 1.0, "distance": "l2", "steps": (1, 2, 4), **config}
    nets = {"teacher": teacher(), "student": student or OdeMap()}
    return seat(LCM(LCM.Config(levels=levels, **config)), nets, FlowPath())


def test_the_bias_of_its_fixed_point_halves_with_the_grid():
    """f at the top equals 48 DDIM steps, off the trajectory by O(1 / levels): ratios within 5 % of 2."""
    found = [bias(lcm(levels)) for levels in (24, 48, 96)]
    assert found[0] / found[1] == pytest.approx(2, rel=0.05)
    assert found[1] / found[2] == pytest.approx(2, rel=0.05)
    assert found[1] == pytest.approx(0.031, abs=0.002)


def test_the_gradient_vanishes_at_the_trajectories_as_the_grid_is_refined_and_nowhere_else():
    """Neighbours differ by O(h); at the exact map only DDIM's local error O(h^2) is left of it."""
    at = [gradients(lcm(levels)).mean(0).norm().item() for levels in (48, 96)]
    off = [gradients(lcm(levels, OdeMap(std=0.7))).mean(0).norm().item() for levels in (48, 96)]
    assert at[0] / at[1] == pytest.approx(4, rel=0.1) and off[0] / off[1] == pytest.approx(2, rel=0.1)
    assert off[1] > 20 * at[1]


def test_training_reaches_the_gaussian_at_every_number_of_steps():
    """From N(0, 1): W2 of 1, 2 and 4 steps below 5 % of the std."""
    method = lcm(student=OdeMap([0.0, 0.0], 1.0), distance="huber", huber_c=0.01)
    optimizer = torch.optim.Adam(method.student.module.parameters(), 0.03)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 48, 0.5)
    train(method, range(240), data(256), {"student": optimizer}, lambda *_: halving.step())
    for steps in (1, 2, 4):
        made = samples(method, method.schedule_for(steps, "renoise"), 20_000)
        assert gaussian_wasserstein2(made, torch.tensor(MEAN), STD**2 * torch.eye(2)) < 0.05 * STD


@pytest.mark.slow
def test_an_mlp_learns_to_sample_the_mixture_in_one_two_and_four_steps():
    """Sliced W2 to true samples, in units of the data's std; two true sets differ by .04."""
    config = LCM.Config(guidance_scale=1.0, huber_c=0.01, steps=(1, 2, 4))
    method, scale = distilled_mixture(LCM(config))
    for steps in (1, 2, 4):
        made = samples(method, method.schedule_for(steps, "renoise"), 20_000)
        assert sliced_wasserstein2(made, true_samples(20_000)) < 0.16 * scale
