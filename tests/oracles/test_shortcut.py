"""Shortcut models against closed forms (Frans et al., arXiv 2410.12557): consistency of steps, and what is learned."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fewstep.maths.average_velocity import average_velocity
from fewstep.maths.paths import FlowPath, VPPath, expand
from fewstep.maths.solvers import sample
from fewstep.methods.diffusion.shortcut import Shortcut, Step
from fewstep.models.oracle import MLP
from fewstep.nets.extra_inputs import fed
from tests.oracles.average import (
    F64,
    AverageVelocity,
    NativeAverage,
    data,
    exact,
    seated,
)
from tests.oracles.harness import backward, batch, draw, gaussian_wasserstein2, samples, train, updates
from tests.oracles.maps import M, Reads, S

NULL = -0.4
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def taught(network: nn.Module, path=None, rows: int = 512, **config) -> tuple[Tensor, Tensor, Step]:
    """What the two half steps say, and what the network says of the whole step; float64."""
    method = seated(Shortcut, network.double(), path, **config)
    step = Step(*(part.double() if part.dtype.is_floating_point else part for part in method.steps(draw(0, rows))))
    x = torch.randn(rows, 1, dtype=F64, generator=torch.Generator().manual_seed(2))
    cond = batch(rows).cond
    with torch.no_grad():
        return method.taught(x, step, cond), average_velocity(method.student, x, step.t, step.s, cond), step


@pytest.mark.parametrize(
    "path, network",
    [
        (FlowPath(), AverageVelocity()),
        (FlowPath(shift=3.0), AverageVelocity()),
        (VPPath.from_scheduler(BETAS), NativeAverage(VPPath.from_scheduler(BETAS))),
    ],
)
def test_steps_of_the_average_velocity_agree_with_their_halves(path, network):
    """Self-consistency at V*: below 1e-6 for every step but the finest, also where steps are uneven in t."""
    halves, whole, step = taught(network, path)
    assert (halves - whole)[~step.finest].abs().max() < 1e-6
    assert 0 < step.finest.sum() < len(whole) / 4


def test_the_finest_step_stands_on_two_euler_steps_of_the_instantaneous_velocity():
    """[v(x, t) + v(x - h v, t - h)] / 2, off V* by O(h): half of it with twice the steps."""

    def error(finest: int) -> float:
        halves, whole, step = taught(AverageVelocity(), finest=finest, steps=1)
        h = 0.5 / finest
        x = torch.randn(512, 1, dtype=F64, generator=torch.Generator().manual_seed(2))
        t = step.t[:, None]
        first = exact(x, t, t)
        expected = (first + exact(x - h * first, t - h, t - h)) / 2
        torch.testing.assert_close(halves[step.finest], expected[step.finest], rtol=0, atol=1e-6)
        return (halves - whole)[step.finest].abs().mean().item()

    coarse, fine = error(32), error(64)
    assert coarse / fine == pytest.approx(2, rel=0.4) and fine < 0.02


def test_a_network_whose_steps_disagree_is_moved():
    """V* + b (t - s) x: the whole step is bent by b 2d x, its halves by b d x on average."""
    halves, whole, step = taught(AverageVelocity(bend=0.5))
    long = step.t - step.s > 0.4
    assert (halves - whole)[long].abs().mean() > 0.05


def test_the_gradient_leads_back_to_the_average_velocity():
    """One sign for each parameter: raised above its value it is moved down, lowered it is moved up."""
    for name, value, amount in (("means", M, 0.2), ("std", S, 0.2), ("bend", 0.0, 0.5)):
        for side in (1, -1):
            method = seated(Shortcut, label_dropout=0.0)
            parameter = getattr(method.student.module, name)
            parameter.data.fill_(value + side * amount)
            (update,) = updates(method, [0], lambda _: data(4096))
            backward(method, update)
            assert side * parameter.grad.flatten()[0] > 0, (name, side)


def test_flow_rows_are_regressed_on_the_instantaneous_velocity():
    """At V* their residual is the noise of a sample, which no parameter of the network correlates with."""
    method, rows = seated(Shortcut, label_dropout=0.0), 40_000
    (update,) = updates(method, [0], lambda _: data(rows))
    parameters = list(method.student.module.parameters())
    grads = torch.autograd.grad(update.losses["flow"].mean(), parameters, allow_unused=True)
    noise = update.losses["flow"].detach().mean().sqrt() / rows**0.5
    for found in grads:
        assert found is None or found.abs().max() < 6 * noise


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_guidance_has_its_fixed_point_at_the_guided_velocity(scale):
    """Flow rows: g v_c + (1 - g) V(x, t, t, null) is V of the network that answers for N(m_g, s^2); dropped rows keep v.
    Longer steps inherit it, since the halves of the finest one are told d = 0."""
    mean = scale * M + (1 - scale) * NULL
    method = seated(Shortcut, AverageVelocity((mean, NULL)).double(), guidance_scale=scale)
    x, t = torch.randn(64, 1, dtype=F64), torch.linspace(0.02, 1, 64, dtype=F64)
    v, cond, kept = exact(x, t[:, None], t[:, None]), batch(64).cond, torch.zeros(64, dtype=torch.bool)
    guided = method.guided(x, v, t, cond, kept)
    torch.testing.assert_close(guided, average_velocity(method.student, x, t, t, cond), rtol=0, atol=1e-6)
    assert torch.equal(method.guided(x, v, t, cond, ~kept), v)


@pytest.mark.parametrize("steps", [1, 2, 8, 128])
def test_the_sampler_is_exact_at_every_number_of_steps_offered(steps):
    """x - (t - s) V* is the trajectory: m + s z."""
    method = seated(Shortcut, steps=steps)
    made = sample(method.student, method.schedule(), batch(64).cond, draw(0, 64), (1,))
    torch.testing.assert_close(made, M + S * draw(0, 64).normal("rollout.start", 1), rtol=0, atol=2e-5)


# what is learned


class Ladder(nn.Module):
    """V linear in x with parameters of its own for every step of the grid, and v itself at s = t."""

    def __init__(self, finest: int):
        super().__init__()
        self.finest = finest
        self.gain = nn.Parameter(torch.zeros(finest.bit_length(), finest))
        self.extra_inputs, self.dim, self.null = Reads("s"), 1, 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """V at x [rows, 1]."""
        t, s = timestep.double() / 1000, fed("s").double()
        width = ((t - s) * self.finest).round().long()
        level = torch.log2(self.finest / width.clamp_min(1)).round().long()
        gain = self.gain[level, (t * self.finest / width.clamp_min(1)).round().long() - 1]
        centred = x - (1 - expand(t, x)) * M
        own = -M + expand(gain, x) * centred
        return torch.where(expand((width > 0).double(), x) > 0, own, exact(x, expand(t, x), expand(t, x))).to(x.dtype)


def test_the_fixed_point_is_the_euler_sampler_of_twice_the_finest_steps():
    """The halves of the finest step are Euler steps and longer steps are pairs, so one step learns what 2 finest of
    them do: the std of a sample is that product, here 16 steps, .585 where the data has .6."""
    finest = 8
    method = seated(Shortcut, Ladder(finest), finest=finest, steps=1, label_dropout=0.0, consistency_share=0.75)
    optimizer = torch.optim.Adam(method.student.module.parameters(), 0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    train(method, range(150), lambda step: data(256, seed=step), {"student": optimizer}, lambda *_: decay.step())
    z = torch.tensor([-1.0, 1.0], dtype=F64)[:, None]
    times = torch.linspace(1, 0, 2 * finest + 1, dtype=F64)
    for t, below in pairwise(times):
        z = z - (t - below) * exact(z, t, t)
    euler = (z[1] - z[0]).item() / 2
    made = samples(method, method.schedule(), 4096)
    assert abs(euler - S) > 0.01
    assert made.std().item() == pytest.approx(euler, rel=0.03)


@pytest.mark.slow
def test_a_small_network_learns_to_sample_a_gaussian_in_any_number_of_steps():
    """An MLP with its own input for s, from scratch: W2 below .1 s at 1, 2 and 4 steps."""
    torch.manual_seed(0)
    network = MLP.upgrade(MLP.build(dim=2, width=48, depth=2, frequencies=2).module, ("s",))
    method, mean, count = seated(Shortcut, network), torch.tensor([M, -M]), 600
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    train(
        method,
        range(count),
        lambda _: batch(256, x0=mean + S * torch.randn(256, 2, generator=generator)),
        {"student": optimizer},
        lambda *_: decay.step(),
    )
    for steps in (1, 2, 4):
        made = samples(method, seated(Shortcut, network, steps=steps).schedule(), 20_000)
        assert gaussian_wasserstein2(made, mean, S**2 * torch.eye(2)) < 0.1 * S
