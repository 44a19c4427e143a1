"""sCM against the trajectories of a Gaussian (Lu and Song, arXiv 2410.11081): data N(m, s^2).

With S(t) = sqrt((1-t)^2 s^2 + t^2) the consistency function is f(y, t) = m + (s / S(t)) (y - (1-t) m).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.maths.paths import FlowPath, add_noise
from fewstep.methods.diffusion.scm import SCM
from fewstep.nets.weight_head import WeightHead
from tests.oracles.harness import (
    backward,
    batch,
    draw,
    gaussian_wasserstein2,
    samples,
    seat,
    sliced_wasserstein2,
    train,
)
from tests.oracles.ode_map import MEAN, STD, OdeMap, data, fitted, gradients, mixture, teacher
from tests.oracles.students import true_samples

F64 = torch.float64
ROWS = 64
WHOLE = {"tangent": "none", "tangent_warmup": 0}  # the tangent as it is


def scm(student: OdeMap | None = None, **config) -> SCM:
    method = SCM(SCM.Config(**{"steps": (1, 2, 4), "tangent_warmup": 0, **config}))
    nets = {"teacher": teacher(), "student": student or OdeMap(), "weight": WeightHead()}
    return seat(method, {role.name: nets[role.name] for role in method.roles()}, FlowPath())


def tangent(method: SCM, moves: Tensor | None = None, low: float = 0.01, high: float = 0.99) -> Tensor:
    """g at ROWS states between t = low and high, float64, along the teacher's field or `moves`."""
    for role in ("teacher", "student"):
        getattr(method, role).module.double()
    y, t, cond = states(low, high)
    moves = method.taught(y, t, cond, 1.0) if moves is None else moves
    return method.tangent(y, method.student.velocity(y, t, cond).detach(), moves, t, cond)


def states(low: float = 0.01, high: float = 0.99) -> tuple:
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(low, high, ROWS, dtype=F64)
    x0, eps = (torch.randn(ROWS, 2, dtype=F64, generator=generator) for _ in range(2))
    return add_noise(torch.tensor(MEAN) + STD * x0, eps, t), t, batch(ROWS).cond


# the tangent


def test_the_tangent_is_zero_at_the_consistency_function_and_nowhere_else():
    """df/da = 0 along the exact trajectories, to 1e-6 (m and s are float32 numbers); not for another std or mean."""
    assert tangent(scm()).abs().max() < 1e-6
    for student in (OdeMap(std=0.6), OdeMap(mean=[0.6, 0.0])):
        assert tangent(scm(student)).square().mean().sqrt() > 0.02


def test_the_teacher_itself_is_not_consistent():
    """A flow network answers f = E[x0 | y]: its tangent is -(1-t) A t dv/dt, and it is not zero."""
    method = scm()
    method.student = method.teacher
    assert tangent(method).square().mean().sqrt() > 0.1


def test_differences_agree_with_forward_mode_to_second_order():
    """Central differences along the trajectory's tangent: the error falls to a quarter with half the step."""
    exact = tangent(scm(OdeMap(std=0.7)), low=0.1, high=0.9)
    found = [
        (tangent(scm(OdeMap(std=0.7), derivative="central", derivative_step=h), low=0.1, high=0.9) - exact).abs().max()
        for h in (0.04, 0.02)
    ]
    assert found[0] / found[1] == pytest.approx(4, rel=0.1) and found[1] < 5e-3


def test_the_tangent_is_linear_in_the_trajectorys_velocity():
    """Hence sCT, whose pairs have dy/dt = eps - x0, equals sCD at their mean, the marginal velocity: E[g(u)] = g(E[u])."""
    shape, generator = (ROWS, 2), torch.Generator().manual_seed(1)
    pairs = [torch.randn(*shape, dtype=F64, generator=generator) for _ in range(5)]
    student = OdeMap(std=0.7)
    each = torch.stack([tangent(scm(student), moves) for moves in pairs]).mean(0)
    together = tangent(scm(student), torch.stack(pairs).mean(0))
    torch.testing.assert_close(each, together, rtol=0, atol=1e-12)
    assert together.abs().max() > 0.1


def test_training_without_a_teacher_has_the_expected_gradient_of_distillation():
    """sCT = sCD in expectation while g is not normalised: within 2 % and three standard errors, off the optimum."""
    law = {"time": {"kind": "uniform"}}
    distill = gradients(scm(OdeMap(std=0.8), **WHOLE, **law), steps=8)
    alone = gradients(scm(OdeMap(std=0.8), mode="train", **WHOLE, **law), steps=24)
    error = alone.std(0) / 24**0.5
    assert (alone.mean(0) - distill.mean(0)).norm() < 0.02 * distill.mean(0).norm() + 3 * error.norm()
    assert error.norm() < 0.2 * distill.mean(0).norm()


# the gradient


@pytest.mark.parametrize("shape", ["norm", "rms", "clip", "none"])
def test_the_gradient_vanishes_at_the_consistency_function_and_points_to_it(shape):
    """At m, s nothing is left of it; too wide a student is made narrower and too narrow a one wider, means alike."""

    def of(std: float, mean: float) -> Tensor:
        return gradients(scm(OdeMap([mean, mean], std), tangent=shape), steps=2, rows=2048).mean(0)

    at = gradients(scm(tangent=shape), steps=2, rows=2048).mean(0)
    wide, narrow = of(0.8, 0.15), of(0.3, 0.15)  # parameters: mean [2], std
    assert at.norm() < 1e-3 * min(wide.norm(), narrow.norm())
    assert wide[2] > 0 > narrow[2]
    assert wide[0] < 0 < wide[1]  # MEAN is (.6, -.3)


def test_the_gradient_is_the_papers():
    """grad L = -(2/D) e^w g . dF/dtheta, and of the weight e^w |g|^2 / D - 1."""
    method = scm(OdeMap(std=0.8), tangent="norm")
    torch.nn.init.normal_(method.weight.module.coefficients, std=0.3, generator=torch.Generator().manual_seed(0))
    rows, numbers = data(ROWS)(0), draw(0, ROWS)
    (update,) = method.train_step(rows, draw(0, ROWS))
    backward(method, update)
    t, eps = method.times(numbers), numbers.normal("eps", 2)
    y, s = add_noise(rows.x0, eps, t), method.config.data_std
    moves = method.taught(y, t, rows.cond, 1.0)
    v = method.student.velocity(y, t, rows.cond)
    g = method.tangent(y, v.detach(), moves, t, rows.cond)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    a = torch.atan2(t, (1 - t) * s)
    w, rate = method.weight(a).detach(), ((1 - t) ** 2 * s**2 + t**2).sqrt() / s  # dF = (A / s) dv
    carrier = -(2 / 2) * (w.exp()[:, None] * g * rate[:, None] * v).sum(1).mean()
    expected = torch.autograd.grad(carrier, list(method.student.module.parameters()))
    for mine, theirs in zip(method.student.module.parameters(), expected):
        torch.testing.assert_close(mine.grad, theirs, rtol=1e-4, atol=1e-6)
    slack = (w.exp() * g.square().mean(1) - 1)[:, None] * (2 * a[:, None] * torch.arange(16)).cos()
    torch.testing.assert_close(method.weight.module.coefficients.grad, slack.mean(0), rtol=1e-4, atol=1e-5)


# what is learned


def trained(method: SCM, steps: int = 200) -> SCM:
    """After some steps of Adam with halving rates."""
    rows = 256 if method.config.mode == "distill" else 2048  # pairs are noisier than their mean
    optimizer = torch.optim.Adam(method.student.module.parameters(), 0.03)
    weight = torch.optim.Adam(method.weight.module.parameters(), 0.02)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, steps // 5, 0.5)
    train(method, range(steps), data(rows), {"student": optimizer, "weight": weight}, lambda *_: halving.step())
    return method


@pytest.mark.parametrize(
    "config",
    [{}, {"tangent": "clip"}, {"tangent_warmup": 100, "derivative": "central"}, {"mode": "train", "tangent": "none"}],
)
def test_training_reaches_the_gaussian_at_every_number_of_steps(config):
    """From N(0, 1): W2 of 1, 2 and 4 stochastic steps below 5 % of the std, with and without a teacher."""
    method = trained(scm(OdeMap([0.0, 0.0], 1.0), time={"kind": "mix"}, **config))
    for steps in (1, 2, 4):
        made = samples(method, method.schedule_for(steps), 20_000)
        assert gaussian_wasserstein2(made, torch.tensor(MEAN), STD**2 * torch.eye(2)) < 0.05 * STD


def test_while_r_is_zero_a_step_pulls_to_the_trajectorys_velocity():
    """Before the warm-up the teacher's own field has no gradient, and the consistency function has one."""
    fields = [gradients(scm(net, tangent_warmup=10, tangent="none"), steps=1).norm() for net in (teacher(), OdeMap())]
    assert fields[0] < 1e-5 < 1e-2 < fields[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode, most", [("distill", 0.2), ("train", 0.35)])
def test_an_mlp_learns_to_sample_the_mixture_in_one_two_and_four_steps(mode, most):
    """Sliced W2 to true samples, in units of the data's std; two true sets differ by .04."""
    scale = true_samples(20_000).std(0).mean().item()
    config = {"mode": mode, "time": {"kind": "mix"}, "tangent_warmup": 200, "data_std": scale}
    method = SCM(SCM.Config(**config))
    nets = {"teacher": mixture(), "student": fitted(mixture()), "weight": WeightHead()}
    seat(method, {role.name: nets[role.name] for role in method.roles()}, FlowPath())
    generator, label = torch.Generator().manual_seed(3), torch.zeros(256, dtype=torch.long)
    optimizer = torch.optim.Adam(method.student.module.parameters(), 3e-4, betas=(0.9, 0.99))
    weight = torch.optim.Adam(method.weight.module.parameters(), 1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    train(
        method,
        range(2500),
        lambda _: batch(256, x0=mixture().data(label, generator)),
        {"student": optimizer, "weight": weight},
        lambda *_: decay.step(),
    )
    for steps in (1, 2, 4):
        made = samples(method, method.schedule_for(steps), 20_000)
        assert sliced_wasserstein2(made, true_samples(20_000)) < most * scale
