"""SCott against closed forms (arXiv 2403.01505), with one-dimensional Gaussian data N(m, s^2) and its exact teacher.

V(t) = (1-t)^2 s^2 + t^2. Under a squared loss f settles at the mean end point of the solver's random paths,
f*(x, t) = m + (alpha_t s / sqrt V_t)^(eta^2) (s / sqrt V_t) (x - alpha_t m), and with finite steps at a product of the
steps' own slopes.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.maths.consistency import below
from fewstep.maths.paths import FlowPath
from fewstep.methods.diffusion.scott import SCott
from fewstep.methods.diffusion.trajectory import Interval
from fewstep.models.build import parse
from fewstep.models.oracle import GAUSSIAN
from fewstep.roles import RoleSpec, assemble
from tests.oracles.harness import batch, draw, seat, train

M, S, TOP = 0.7, 0.6, 0.9


class Slopes(nn.Module):
    """One number a level of a uniform grid: f(x, t_n) = m + a_n (x - (1 - t_n) m), as a flow network."""

    def __init__(self, levels: int, top: float = TOP):
        super().__init__()
        self.slope = nn.Parameter(torch.full((levels,), 0.5, dtype=torch.float64))
        self.top, self.dim, self.null = top, 1, 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """v at x [rows, 1]; at t = 0 it does not matter, x0 = x - 0 v."""
        t = timestep / 1000
        n = (t / self.top * len(self.slope)).round().long() - 1
        x0 = M + self.slope[n.clamp_min(0)][:, None] * (x - (1 - t)[:, None] * M)
        return (x - x0) / t[:, None].clamp_min(1e-9)


class Silent(Draw):
    """Draws zeros: an affine solver then answers with its mean over the noise."""

    def normal(self, name: str, *row_shape: int, per="row") -> Tensor:
        return torch.zeros(self.rows, *row_shape, dtype=torch.float64)


def scott(levels: int = 9, **config) -> SCott:
    """The method on the grid 0.9, 0.8, ..., 0.1 (for 9 levels), with linear student and closed-form teacher."""
    said = {"levels": levels, "skip": None, "guidance_scale": 1.0, "adversarial": None, "distance": "l2", **config}
    teacher = GAUSSIAN.build(means=[[M]], std=[S]).module.double()
    method = SCott(parse(SCott.Config, said, "config"))
    return seat(method, {"teacher": teacher, "student": Slopes(levels)}, FlowPath(t_max=TOP))


def variance(t: float) -> float:
    """V(t)."""
    return (1 - t) ** 2 * S**2 + t**2


def ideal(t: float, eta: float) -> float:
    """The slope of f* at t."""
    root = math.sqrt(variance(t))
    return ((1 - t) * S / root) ** (eta**2) * S / root


def product(eta: float, edges: list[float]) -> float:
    """The discrete fixed point: A of every solver step multiplied, from t = edges[0] down to 0."""
    total = 1.0
    for s, u in pairwise(edges):
        clean = (1 - s) * S**2 / variance(s)  # slope of the denoiser; the last step is this alone
        if u > 1e-9:
            h = math.log((1 - u) * s / ((1 - s) * u))
            keep = u / s * math.exp(-(eta**2) * h)
            clean = keep + (1 - u) * -math.expm1(-(1 + eta**2) * h) * clean
        total *= clean
    return total


def settle(method: SCott) -> Tensor:
    """The slopes where the loss has its minimum given its own targets, from the lowest level up."""
    slopes = method.student.module.slope.data
    x, cond = torch.tensor([[0.0], [1.0]], dtype=torch.float64), batch(2).cond
    for u in reversed(method.grid()):
        here = torch.full((2,), u, dtype=torch.float64)
        at = Interval(here, below(here, method.path, method.levels))
        target = method.target(method.walked(x, at, cond, 1.0, Silent(0, 0, [0, 1])), at.u_next, cond)
        slopes[round(u / TOP * method.levels) - 1] = (target[1] - target[0]).item()
    return slopes


# 1: the transition


@pytest.mark.parametrize(
    "eta, mean, std",
    [(0.0, 1.251050, 0.0), (0.5, 0.896939, 0.436157), (1.0, 0.552212, 0.514412), (1.3, 0.501053, 0.516085)],
)
def test_the_walk_has_the_transition_of_the_sde(eta, mean, std):
    """Property 1: from x = 1.4 at t = .9 to .3 in 100 sub-steps, by the method's own noise."""
    rows = 6000
    method, x = scott(eta=eta, substeps=100), torch.full((rows, 1), 1.4, dtype=torch.float64)
    at = Interval(*(torch.full((rows,), w, dtype=torch.float64) for w in (0.9, 0.3)))
    y = method.walked(x, at, batch(rows).cond, 1.0, draw(0, rows))
    error = 4 * max(std, 1e-9) / math.sqrt(rows)
    assert y.mean().item() == pytest.approx(mean, abs=error + 8e-3)  # 100 steps of first order
    assert y.std().item() == pytest.approx(std, abs=error + 8e-3)


# 5: fixed points


@pytest.mark.parametrize(
    "eta, substeps, slope",
    [
        (0.0, 1, 0.579777),
        (0.0, 3, 0.635526),
        (0.5, 1, 0.298146),
        (0.5, 3, 0.323856),
        (1.0, 1, 0.044248),
        (1.0, 3, 0.044248),
    ],
)
def test_discrete_fixed_point_on_nine_intervals(eta, substeps, slope):
    """Property 5: a_n = prod A over the solver's steps below t_n; at eta = 1 the posterior mean at every level."""
    slopes = settle(scott(eta=eta, substeps=substeps))
    assert slopes[-1].item() == pytest.approx(slope, abs=1e-6)
    for n, a in enumerate(slopes.tolist(), start=1):
        t = n * TOP / 9
        edges = np.linspace(t, 0, n * substeps + 1).tolist()
        assert a == pytest.approx(product(eta, edges), abs=2e-7)
        if eta == 1:
            assert a == pytest.approx((1 - t) * S**2 / variance(t), abs=2e-7)


@pytest.mark.parametrize("eta, slope", [(0.0, 0.665190), (0.5, 0.337818), (1.0, 0.044248)])
def test_on_fine_grids_the_fixed_point_is_the_mean_end_point(eta, slope):
    """Property 5: the slope of f* at t = .9; the error of 60 and 240 intervals falls as their width."""
    assert ideal(0.9, eta) == pytest.approx(slope, abs=1e-6)
    errors = [slope - settle(scott(levels, eta=eta, substeps=1))[-1].item() for levels in (60, 240)]
    assert abs(errors[1]) < 0.006 and (eta == 1 or errors[0] / errors[1] == pytest.approx(4, rel=0.15))


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_more_substeps_come_monotonically_closer(eta):
    """Property 6 for eta < 1."""
    gaps = [ideal(0.9, eta) - settle(scott(eta=eta, substeps=h))[-1].item() for h in (1, 2, 3, 6, 12)]
    assert all(0 < later < earlier for earlier, later in pairwise(gaps))


def test_at_eta_one_the_target_s_mean_does_not_depend_on_substeps():
    """Property 6: the exact step has no bias for Gaussian data."""
    slopes = [settle(scott(eta=1.0, substeps=h)) for h in (1, 2, 3, 6)]
    for other in slopes[1:]:
        torch.testing.assert_close(other, slopes[0], rtol=0, atol=2e-7)


def test_the_second_order_solver_reaches_the_ode_map_with_fewer_steps():
    """eta = 0, three sub-steps: its error is a fraction of the first order's."""
    first, second = (ideal(0.9, 0) - settle(scott(eta=0, solver=s))[-1].item() for s in ("er_sde", "sde_dpm_2"))
    assert abs(second) < first / 2


@pytest.mark.parametrize("eta, substeps", [(0.0, 1), (0.5, 3)])
def test_training_reaches_the_fixed_point(eta, substeps):
    """Property 5 by descent: Adam on the real step, averaged targets, noise of data and solver."""
    rows, steps = 1024, 200
    method = scott(eta=eta, substeps=substeps)
    student = method.student
    student.handle.ema = {"slope": nn.Parameter(student.module.slope.detach().clone(), requires_grad=False)}
    optimizer = torch.optim.Adam(student.module.parameters(), lr=0.06, betas=(0.8, 0.99))
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def data(step: int) -> Batch:
        return batch(rows, x0=M + S * draw(step, rows).within("data").normal("x0", 1).double())

    def after(_count, _update) -> None:
        student.update_ema(0.8)
        slower.step()

    train(method, range(steps), data, {"student": optimizer}, after)
    expected = product(eta, np.linspace(TOP, 0, 9 * substeps + 1).tolist())
    assert student.module.slope[-1].item() == pytest.approx(expected, abs=0.03)


def test_one_step_spread_shrinks_with_eta_as_predicted():
    """The collapse: std of f*(x_t) is s (alpha_t s / sqrt V_t)^(eta^2), at t = .9 .600, .305, .040 for eta 0, .5, 1."""
    x = (1 - TOP) * M + math.sqrt(variance(TOP)) * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    for eta, expected in ((0.0, 0.6), (0.5, 0.3047), (1.0, 0.0399)):
        assert (ideal(TOP, eta) * x).std().item() == pytest.approx(expected, rel=0.02)
    slopes = settle(scott(eta=0.5, substeps=12))
    assert (slopes[-1] * x).std().item() == pytest.approx(0.3047, rel=0.04)


# 7: the discriminator


def test_the_discriminator_pulls_towards_the_data():
    """A student whose samples lie at 0 while data lie at (1, 1): after D's turns the adversarial term moves them there."""
    method = SCott(parse(SCott.Config, {"eta": 0, "guidance_scale": 1.0, "levels": 8}, "config"))
    mlp = {"from": "mlp", "build": {"dim": 2, "classes": 1, "width": 32}}
    handles = assemble(
        method.roles(), {"teacher": RoleSpec(**mlp), "discriminator": RoleSpec(lora={"rank": 4})}, seed=0
    )
    method.bind(handles, {}, {})
    parameters = [p for r in ("discriminator", "heads") for p in getattr(method, r).trainable().values()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    rows, cond = 256, Cond(label=torch.zeros(256, dtype=torch.long))
    for step in range(150):
        numbers = draw(step, rows)
        data = Batch(torch.arange(rows), {"cond": cond, "x0": 1 + 0.1 * numbers.normal("x0", 2)})
        t = method.judged_at(method.interval(numbers), numbers)
        update = method.discrimination(0.1 * numbers.normal("fake", 2), t, data, numbers)
        optimizer.zero_grad()
        update.losses["discriminator"].mean().backward()
        optimizer.step()
    assert update.metrics["logits_real"].mean() > 0.5 > -0.5 > update.metrics["logits_fake"].mean()
    made = torch.zeros(rows, 2, requires_grad=True)
    method.fooling(made, t, cond, draw(999, rows)).mean().backward()
    assert (made.grad.sum(0) < 0).all()  # descent raises both coordinates
