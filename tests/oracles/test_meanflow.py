"""MeanFlow against closed forms (Geng et al., arXiv 2505.13447): the identity, its guided form, and what is learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.maths.average_velocity import average_velocity
from fewstep.maths.paths import Path, VPPath
from fewstep.maths.solvers import sample
from fewstep.methods.diffusion.meanflow import MeanFlow
from tests.oracles.average import (
    AverageVelocity,
    NativeAverage,
    Polynomial,
    data,
    distance,
    exact,
    places,
    seated,
    stationary,
)
from tests.oracles.harness import backward, batch, draw, train, updates
from tests.oracles.maps import M, S

NULL = -0.4  # mean of the null class
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def residual(network: nn.Module, path: Path | None = None, **config) -> Tensor:
    """u - [v - (t - s) du/dt] [rows] at many (x, t, s) in float64, with the marginal velocity for v."""
    method = seated(MeanFlow, network.double(), path, **config)
    x, t, s, cond = places()
    if path is not None:
        t = path.t_min + (path.t_max - path.t_min) * (0.001 + 0.998 * t)
        s = s * t
    target = method.target(x, exact(x, t[:, None], t[:, None]), t, s, cond, torch.arange(len(x)))
    with torch.no_grad():
        return (average_velocity(method.student, x, t, s, cond) - target)[:, 0]


# the identity


def test_the_identity_holds_at_the_average_velocity():
    """Eq. 6 at V*: below 1e-6 with forward mode (m and s are float32 numbers), O(h^2) with central differences."""
    assert residual(AverageVelocity()).abs().max() < 1e-6
    coarse, fine = (
        residual(AverageVelocity(), derivative="central", derivative_step=h)[4:-4].abs().max() for h in (0.02, 0.01)
    )
    assert coarse / fine == pytest.approx(4, rel=0.1) and fine < 1e-3


def test_off_the_average_velocity_the_identity_is_broken_by_twice_the_bend():
    """u = V* + b (t - s) x leaves u + (t - s) du/dt - v = 2 b (t - s) x + b (t - s)^2 v."""
    x, t, s, _ = places()
    gap, v = (t - s)[:, None], exact(x, t[:, None], t[:, None])
    expected = 0.5 * gap * (2 * x + gap * v)
    torch.testing.assert_close(residual(AverageVelocity(bend=0.5)), expected[:, 0], rtol=0, atol=1e-6)
    assert expected.abs().max() > 0.3


def test_the_identity_of_a_ddpm_network_is_that_of_its_flow_state():
    """Forward mode goes through table, clock and scale: an eps network that answers V* has no residual from t_max down."""
    path = VPPath.from_scheduler(BETAS)
    assert residual(NativeAverage(path), path=path).abs().max() < 1e-5


def test_the_residual_of_data_rows_has_no_mean_at_the_average_velocity():
    """With v = eps - x0 of a sample it is v - E[v | x_t] in every row, which no function of (x_t, t, s) correlates with."""
    method, rows = seated(MeanFlow, weight_power=0.0, label_dropout=0.0), 40_000
    (update,) = updates(method, [0], lambda _: data(rows))
    backward(method, update)
    noise = update.losses["identity"].detach().mean().sqrt() / rows**0.5
    for name in ("means", "std", "bend"):
        assert getattr(method.student.module, name).grad.abs().max() < 6 * noise, name


def test_the_gradient_leads_back_to_the_average_velocity():
    """One sign for each parameter: raised above its value it is moved down, lowered it is moved up."""
    for name, value, step in (("means", M, 0.2), ("std", S, 0.2), ("bend", 0.0, 0.3)):
        for side in (1, -1):
            method = seated(MeanFlow, weight_power=0.0, label_dropout=0.0)
            parameter = getattr(method.student.module, name)
            parameter.data.fill_(value + side * step)
            (update,) = updates(method, [0], lambda _: data(4096))
            backward(method, update)
            assert side * parameter.grad.flatten()[0] > 0, (name, side)


# guidance


def guided_network(scale: float) -> AverageVelocity:
    """The fixed point: class 0 answers for N(m_g, s^2), the null class for its own Gaussian."""
    return AverageVelocity((scale * M + (1 - scale) * NULL, NULL)).double()


@pytest.mark.parametrize("mix", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_guidance_has_its_fixed_point_at_the_guided_velocity_for_every_mix(scale, mix):
    """v~ of E[v | x, c] is g v_c + (1 - g) v_null, and u^cfg satisfies the identity with it; dropped rows keep v."""
    method = seated(MeanFlow, guided_network(scale), guidance_scale=scale, guidance_mix=mix)
    x, t, s, cond = places()
    v = {mean: exact(x, t[:, None], t[:, None], mean) for mean in (M, NULL)}
    kept = torch.zeros(len(x), dtype=torch.bool)
    guided = method.guided(x, v[M], t, cond, kept)
    torch.testing.assert_close(guided, scale * v[M] + (1 - scale) * v[NULL], rtol=0, atol=1e-6)
    target = method.target(x, guided, t, s, cond, torch.arange(len(x)))
    torch.testing.assert_close(average_velocity(method.student, x, t, s, cond), target, rtol=0, atol=1e-6)
    assert torch.equal(method.guided(x, v[NULL], t, cond, ~kept), v[NULL])


@pytest.mark.parametrize("mix", [0.0, 0.5, 0.9])
def test_mixing_leaves_so_much_less_of_the_samples_noise(mix):
    """d v~ / d v = (1 - k) g, the paper's omega."""
    method = seated(MeanFlow, guided_network(2.0), guidance_scale=2.0, guidance_mix=mix)
    x, t, _, cond = places()
    kept = torch.zeros(len(x), dtype=torch.bool)
    moved = method.guided(x, x + 1, t, cond, kept) - method.guided(x, x, t, cond, kept)
    torch.testing.assert_close(moved, torch.full_like(x, 2 * (1 - mix)))


def test_outside_its_interval_nothing_is_guided():
    method = seated(MeanFlow, guided_network(2.0), guidance_scale=2.0, guidance_interval=(0.3, 0.6))
    x, t, _, cond = places()
    changed = (method.guided(x, x, t, cond, torch.zeros(len(x), dtype=torch.bool)) != x)[:, 0]
    assert torch.equal(changed, (t >= 0.3) & (t <= 0.6))


# sampling


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_sampler_is_exact_in_any_number_of_steps(steps):
    """x - (t - s) V* is the trajectory: m + s z, whatever N is."""
    method = seated(MeanFlow, steps=steps)
    made = sample(method.student, method.schedule(), batch(64).cond, draw(0, 64), (1,))
    torch.testing.assert_close(made, M + S * draw(0, 64).normal("rollout.start", 1), rtol=0, atol=2e-6)


# what is learned


INTERVALS = (torch.zeros_like, lambda t: t / 2, lambda t: t)  # s of t: one step, half of it, none


def test_the_stationary_point_is_the_average_velocity():
    """A student linear in its parameters, degree 4 in (t, s), and 16,000 samples: .05 from V* for one step and .03 for
    half of it or none, root mean square where V* has 1. (The same degree fitted to V* itself stays .01 off.)"""
    config = {"weight_power": 0.0, "interval_share": 0.5, "label_dropout": 0.0, "time": {"kind": "uniform"}}
    method, rows = seated(MeanFlow, Polynomial(4), **config), data(16_384)
    assert distance(method) > 0.8

    def gradient() -> list[Tensor]:
        (update,) = method.train_step(rows, draw(0, len(rows)))
        return list(torch.autograd.grad(update.losses["identity"].mean(), list(method.student.module.parameters())))

    stationary(method, gradient)
    found = [distance(method, where) for where in INTERVALS]
    assert max(found) < 0.08, found


@pytest.mark.parametrize("config", [{}, {"weight_power": 0.5}, {"derivative": "central"}])
def test_a_linear_student_learns_it_by_gradient_steps(config):
    """From V = 0, 300 steps of Adam: from .86 to .12 - .14 for one step. (p = 1 is for rows of many elements: on a line it
    divides a gradient that is as small as the residual by its square.)"""
    said = {"weight_power": 0.0, "interval_share": 0.5, "label_dropout": 0.0, **config}
    method = seated(MeanFlow, Polynomial(3), **said)
    optimizer = torch.optim.Adam(method.student.module.parameters(), 0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    train(method, range(300), lambda step: data(256, seed=step), {"student": optimizer}, lambda *_: decay.step())
    found = [distance(method, where) for where in INTERVALS]
    assert max(found) < 0.2, found
