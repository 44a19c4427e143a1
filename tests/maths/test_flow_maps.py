"""A flow map with its teacher: every mix of the two ends where the teacher's ODE does, at the stated cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.maths.flow_maps import best_noise, finish, flow_map, renoise, teacher_walk
from fewstep.maths.paths import FlowPath, Path

F64 = torch.float64
ROWS = 7


@dataclass
class Exact:
    """The exact map of the Gaussian `data`, as a network that reads its duration."""

    data: Any
    path: Path = field(default_factory=FlowPath)
    calls: int = 0

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """V = (z - f*) / delta."""
        self.calls += 1
        assert (t == self.path.t_max).all()
        delta = cond["delta"][:, None]
        return (x - self.data.transport(x, 1.0, 1 - delta)) / delta


@dataclass
class Counted:
    """The Gaussian's velocity; rows are counted, and the null condition is another mean."""

    data: Any
    path: Path = field(default_factory=FlowPath)
    rows: int = 0

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.rows += len(x)
        return self.data.velocity(x, t) - 0.1 * cond["null"][:, None]

    def null(self, cond: Cond) -> Cond:
        return cond.with_(null=torch.ones_like(cond["null"]))


@pytest.fixture
def pair(oracle) -> tuple[Exact, Counted, Tensor, Cond]:
    """Student, teacher, z, condition."""
    data = oracle.Gaussian()
    z = torch.randn(ROWS, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    return Exact(data), Counted(data), z, Cond(null=torch.zeros(ROWS, dtype=F64))


def test_map_is_start_minus_duration_times_velocity(pair):
    student, _, z, cond = pair
    delta = torch.linspace(0.1, 1, ROWS, dtype=F64)
    expected = torch.cat([student.data.transport(z[i : i + 1], 1.0, 1 - delta[i].item()) for i in range(ROWS)])
    torch.testing.assert_close(flow_map(student, z, delta, cond), expected)
    assert student.calls == 1


@pytest.mark.parametrize("solver, steps, order", [("euler", 32, 1), ("heun", 16, 2)])
def test_finishing_with_the_teacher_converges_to_its_own_ode(pair, solver, steps, order):
    """finish: f(z, .6), then the teacher from t = .4; halving its steps' width divides the error by 2^order."""
    student, teacher, z, cond = pair
    exact = student.data.transport(z, 1.0, 0.0)
    errors = [
        (finish(student, teacher, z, cond, 0.6, n, solver=solver) - exact).abs().max().item()
        for n in (steps, 2 * steps)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2) and errors[1] < 0.01


def test_renoising_keeps_the_law(oracle):
    """(1-t) x0 + t n cleaned by the teacher is distributed as the data again."""
    data = oracle.Gaussian()
    generator, rows = torch.Generator().manual_seed(0), 40_000
    z, n = torch.randn(2, rows, 1, dtype=F64, generator=generator).unbind()
    cond = Cond(null=torch.zeros(rows, dtype=F64))
    made = renoise(Exact(data), Counted(data), z, n, cond, t=0.4, steps=50)
    assert made.mean().item() == pytest.approx(data.mean, abs=0.01)
    assert made.std().item() == pytest.approx(data.std, abs=0.015)
    plain = flow_map(Exact(data), z, z.new_ones(rows), cond)
    assert 0.05 < (made - plain).std() < data.std  # other samples, near the first ones


@pytest.mark.parametrize(
    "solver, scale, evaluations", [("euler", 1.0, 4), ("euler", 2.0, 8), ("heun", 1.0, 7), ("heun", 2.0, 14)]
)
def test_cost_of_the_teachers_steps(pair, solver, scale, evaluations):
    """K, or 2 K - 1 with Heun, and twice that with guidance; the student adds one."""
    student, teacher, z, cond = pair
    finish(student, teacher, z, cond, 0.5, 4, scale=scale, solver=solver)
    assert (student.calls, teacher.rows) == (1, evaluations * ROWS)


def test_guidance_acts_within_its_interval(pair):
    """v_g - v = (g - 1) .1 here, at the two of four steps whose t lies within (.4, 1): x moves by -.5 of it."""
    _, teacher, z, cond = pair
    plain, guided = (teacher_walk(teacher, z, 1.0, cond, 4, scale=g, interval=(2.0, 3.0)) for g in (1.0, 3.0))
    assert torch.equal(plain, guided)
    assert (teacher_walk(teacher, z, 1.0, cond, 4, scale=3.0, interval=(0.0, 0.3)) - plain).abs().min() > 0.01


def test_best_noise_is_the_one_whose_sample_scores_highest(pair):
    """One student call a candidate; row i gets the candidate that is best for row i."""
    student, _, _, cond = pair
    starts = torch.randn(5, ROWS, 1, dtype=F64, generator=torch.Generator().manual_seed(2))
    chosen = best_noise(student, starts, cond, lambda x0, _: -(x0[:, 0] - 1.0).abs())
    assert student.calls == 5 and chosen.shape == (ROWS, 1)
    ends = student.data.transport(starts, 1.0, 0.0)
    expected = (ends - 1.0).abs().min(0).values
    torch.testing.assert_close((student.data.transport(chosen, 1.0, 0.0) - 1.0).abs(), expected)
