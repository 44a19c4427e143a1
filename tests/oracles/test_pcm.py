"""Phased consistency against the trajectories of a Gaussian, piece by piece, and a mixture's samples."""

from __future__ import annotations

import pytest
import torch

from fewstep.draws import Draw
from fewstep.maths.paths import FlowPath
from fewstep.methods.diffusion.pcm import PCM
from tests.oracles.harness import DRAW_SEED, gaussian_wasserstein2, samples, seat, sliced_wasserstein2, train
from tests.oracles.ode_map import MEAN, STD, OdeMap, data, gradients, teacher
from tests.oracles.students import distilled_mixture, true_samples

EDGES = {m: tuple(i / m for i in range(m)) for m in (1, 2, 4, 8)}


def pcm(phases: int, levels: int = 48, student: OdeMap | None = None, **config) -> PCM:
    config = {"guidance_scale": 1.0, "distance": "l2", **config}
    nets = {"teacher": teacher(), "student": student or OdeMap(edges=EDGES[phases])}
    return seat(PCM(PCM.Config(steps=(phases,), levels=levels, **config)), nets, FlowPath())


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_exact_phase_maps_compose_to_the_whole_trajectory(phases):
    """The deterministic sampler of a student that jumps exactly lands at m + s x for every number of phases."""
    method = pcm(phases)
    noise = Draw.for_images(DRAW_SEED + 1, range(64)).normal("rollout.start", 2)
    made = samples(method, method.schedule(), 64)
    torch.testing.assert_close(made, torch.tensor(MEAN) + STD * noise, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_the_gradient_vanishes_at_the_phase_maps_as_the_grid_is_refined_and_nowhere_else(phases):
    """Neighbours differ by O(h); at the exact phase maps only DDIM's local error O(h^2) is left of it."""

    def off_student():
        return OdeMap(std=0.7, edges=EDGES[phases])

    at = [gradients(pcm(phases, n)).mean(0).norm().item() for n in (48, 96)]
    off = [gradients(pcm(phases, n, off_student())).mean(0).norm().item() for n in (48, 96)]
    assert at[0] / at[1] == pytest.approx(4, rel=0.1) and off[0] / off[1] == pytest.approx(2, rel=0.15)
    assert off[1] > 20 * at[1]


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_training_reaches_the_gaussian(phases):
    """From N(0, 1): W2 of the deterministic M-step sampler below 5 % of the std."""
    method = pcm(phases, student=OdeMap([0.0, 0.0], 1.0, EDGES[phases]), distance="huber", huber_c=0.01)
    optimizer = torch.optim.Adam(method.student.module.parameters(), 0.03)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 48, 0.5)
    train(method, range(240), data(256), {"student": optimizer}, lambda *_: halving.step())
    made = samples(method, method.schedule(), 20_000)
    assert gaussian_wasserstein2(made, torch.tensor(MEAN), STD**2 * torch.eye(2)) < 0.05 * STD


@pytest.mark.slow
@pytest.mark.parametrize("phases, most", [(1, 0.16), (2, 0.08), (4, 0.07)])
def test_an_mlp_learns_to_sample_the_mixture(phases, most):
    """Sliced W2 of the M-step sampler to true samples, in units of the data's std; two true sets differ by .04."""
    method, scale = distilled_mixture(PCM(PCM.Config(steps=(phases,), guidance_scale=1.0, huber_c=0.01)))
    made = samples(method, method.schedule(), 20_000)
    assert sliced_wasserstein2(made, true_samples(20_000)) < most * scale
