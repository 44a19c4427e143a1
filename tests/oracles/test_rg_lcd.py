"""RG-LCD against closed forms (Li et al., arXiv 2403.11027): the grid, the boundary, the teacher's step, the reward's drift.

On DDPM tables x_k = alpha x0 + sigma eps with alpha^2 = abar. Data N(m, s^2) have V = alpha^2 s^2 + sigma^2 and

    x0^ = m + alpha s^2 / V (x - alpha m),   eps^ = sigma (x - alpha m) / V
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fewstep.maths.consistency import boundary, lcm_scalings, ode_step
from fewstep.maths.guidance import guided, guided_x0
from fewstep.maths.paths import FlowPath, Path, VPPath
from fewstep.methods.diffusion.rg_lcd import RGLCD
from fewstep.methods.diffusion.trajectory import Interval
from fewstep.models.oracle import GAUSSIAN, MLP
from tests.methods.rewarded import Mean, seat
from tests.oracles.harness import batch, draw, train

M, S = 0.8, 0.6
SD = VPPath.from_scheduler({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


def native(k: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of Stable Diffusion's table at whole timesteps."""
    abar = torch.tensor(SD.alphas_cumprod, dtype=torch.float64)[k.round().long()]
    return abar.sqrt(), (1 - abar).sqrt()


class EpsGaussian(nn.Module):
    """eps^(x, k) of N(m, s^2) on the table, exact."""

    dim, null = 1, 10

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(M, dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """[rows, 1]."""
        alpha, sigma = (part[:, None] for part in native(timestep))
        return sigma * (x - alpha * self.mean) / (alpha**2 * S**2 + sigma**2)


def exact(path: Path, **config) -> RGLCD:
    """The method with the exact teacher of N(m, s^2)."""
    method = RGLCD(RGLCD.Config(**{"guidance_scale": 1.0, "reward": "linear", **config}))
    teacher = EpsGaussian() if isinstance(path, VPPath) else GAUSSIAN.build(means=[[M]], std=[S]).module
    student = MLP.build(dim=1, classes=10).module
    return seat(method, {"teacher": teacher, "student": student, "reward": Mean()}, path)


# 1-2: the teacher's step


def test_teacher_s_step_is_ddim_on_the_table():
    """Property 1: x_m = alpha_m x0^ + sigma_m eps^ in native variables, for all 50 intervals 999 -> 979, ..., 19 -> 0."""
    method = exact(SD)
    u = torch.tensor(method.grid(), dtype=torch.float64)
    k, k_next = (1000 * u).round().long(), (1000 * u - 20).round().long().clamp(min=0)
    assert k.tolist() == list(range(999, 0, -20))
    (a, s), (a_next, s_next) = native(k), native(k_next)
    y = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None]
    x = SD.native(y, SD.time(u))[:, 0]
    V = a**2 * S**2 + s**2
    expected = a_next * (M + a * S**2 / V * (x - a * M)) + s_next * s * (x - a * M) / V
    walked = method.walked(y, Interval(u, k_next / 1000), batch(50).cond, 1.0, draw(0, 50))
    torch.testing.assert_close(SD.native(walked, SD.time(k_next / 1000))[:, 0], expected, rtol=1e-5, atol=1e-5)


def composed(path: Path, levels: int) -> float:
    """Largest error of the walk over the whole grid against the exact transport a0 m + sqrt(V0 / V) (x - alpha m)."""
    method = exact(path, levels=levels)
    grid = (*method.grid(), 0.0)
    ends = torch.tensor([path.time(u) for u in (grid[0], grid[-1])], dtype=torch.float64)
    spread = ((1 - ends) ** 2 * S**2 + ends**2).sqrt()  # of the flow state, on any path
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x = (1 - ends[0]) * M + spread[0] * z
    for u, u_next in pairwise(grid):
        at = Interval(*(torch.full((9,), level, dtype=torch.float64) for level in (u, u_next)))
        x = method.walked(x, at, batch(9).cond, 1.0, draw(0, 9))
    return (x - (1 - ends[1]) * M - spread[1] * z).abs().max().item()


@pytest.mark.parametrize("path", [SD, FlowPath()], ids=["table", "flow"])
def test_composed_steps_converge_to_the_transport_at_first_order(path):
    """Property 1: the 50-level walk is near m + s / sqrt(V) (x - alpha m); twice the levels, half the error."""
    errors = [composed(path, levels) for levels in (25, 50, 100, 200)]
    assert errors[1] < 0.05
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2.0, abs=0.25)


def test_guidance_before_or_after_the_conversion_is_the_same_step():
    """Property 2: eps^ combined and then stepped equals x0^ and eps^ combined separately (1e-6)."""
    torch.manual_seed(0)
    network = MLP.build(dim=2, classes=10).module.double()
    method = RGLCD(RGLCD.Config(guidance_scale=(3.0, 15.0), embed_guidance=False, reward="linear"))
    seat(method, {"teacher": network, "student": MLP.build(dim=2, classes=10).module, "reward": Mean()}, SD)
    y, u = torch.randn(50, 2, dtype=torch.float64), torch.tensor(SD.grid(50), dtype=torch.float64)
    t, t_next, cond = SD.time(u), SD.time((u - 0.02).clamp(min=0)), batch(50, classes=10).cond
    scale = torch.linspace(3, 15, 50, dtype=torch.float64)
    x0, eps = (guided(method.teacher, y, t, cond, scale, what=what) for what in ("x0", "eps"))
    apart = (1 - t_next)[:, None] * x0 + t_next[:, None] * eps
    together = ode_step(y, guided_x0(method.teacher, y, t, cond, scale), t, t_next)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)


# 3: the boundary


def test_boundary_scalings_have_their_printed_values():
    """Property 3: c_skip(19) = .25 / (190^2 + .25) = 6.925e-6, c_skip(0) = 1, c_out(0) = 0."""
    skip, out = lcm_scalings(torch.tensor([0.0, 19.0, 999.0], dtype=torch.float64))
    assert skip[1].item() == pytest.approx(6.925e-6, rel=1e-4)
    assert (skip[0].item(), out[0].item()) == (1.0, 0.0)
    torch.testing.assert_close(skip + out**2, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("path", [SD, FlowPath()], ids=["table", "flow"])
def test_at_the_last_level_the_target_is_the_walked_state_itself(path):
    """Property 3: f(x, 0) = x exactly, so for i = 0 the student's network plays no part in its own target."""
    method = exact(path)
    u = torch.full((7,), method.grid()[-1], dtype=torch.float64)
    y, zero = torch.randn(7, 1), torch.zeros(7, dtype=torch.float64)
    x_m = method.walked(y, Interval(u, zero), batch(7).cond, 1.0, draw(0, 7)).float()
    expected = path.native(x_m, path.time(zero).float()) if isinstance(path, VPPath) else x_m
    for offset in (0.0, 3.0):
        method.student.module.leave.bias.data.fill_(offset)
        assert torch.equal(method.target(x_m, zero, batch(7).cond), expected)
    if isinstance(path, VPPath):  # c_out = 0, whatever the network says
        assert torch.equal(boundary(path, x_m, torch.full_like(x_m, 1e6), path.time(zero).float()), expected)


# 6: the reward's drift

LEVELS, MASS, BETA, SLOPE = 8, -0.4, 0.5, 0.2
SHIFT = BETA * SLOPE / 4  # beta a / 2; the stand-in reward has slope a / 2 in the image's own units


class Table(nn.Module):
    """f is one number a level, whatever the input: x0(x, t_i) = values[i - 1]."""

    dim, null = 1, 10

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((LEVELS,), MASS))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """v = (x - x0) / t."""
        level = (timestep / 1000 * LEVELS).round().long().clamp(1, LEVELS) - 1
        return (x - self.values[level][:, None]) / (timestep / 1000).clamp_min(1e-6)[:, None]


def shifts(**config) -> list[float]:
    """How far f_i, i = 1..8, ends from the ODE's end point, for data that are one point and a linear reward."""
    said = {"distance": "l2", "levels": LEVELS, "weights": {"reward": BETA}, "reward": "linear", "guidance_scale": 1.0}
    method = RGLCD(RGLCD.Config(**{**said, **config}))
    point = GAUSSIAN.build(means=[[MASS]], std=[1e-4]).module
    names = [role.name for role in method.roles()]
    nets = {"teacher": point, "student": Table(), "plain": Table(), "reward": Mean(SLOPE)}
    seat(method, {name: nets[name] for name in names})
    students = [name for name in names if name in ("student", "plain")]
    optimizers = {name: torch.optim.SGD([getattr(method, name).module.values], lr=2.0) for name in students}
    train(method, range(120), lambda _: batch(64, x0=torch.full((64, 1), MASS)), optimizers)
    return [value - MASS for value in method.student.module.values.tolist()]


def test_reward_s_shift_adds_up_along_the_grid():
    """Property 6: f_i = ODE + i beta a / 2, since each target already carries the shift of the level below."""
    assert shifts() == pytest.approx([i * SHIFT for i in range(1, LEVELS + 1)], abs=2e-4)


def test_clean_target_keeps_the_shift_at_that_of_one_level():
    """clean_target: the targets are the reward-free student's, so f_i = ODE + beta a / 2 at every level."""
    assert shifts(clean_target=True) == pytest.approx([SHIFT] * LEVELS, abs=2e-4)


def test_a_band_of_levels_bounds_the_shift():
    """reward_band: levels 3 and 4 add a shift each; those above inherit it and add none."""
    expected = [0, 0, SHIFT, 2 * SHIFT, *[2 * SHIFT] * 4]
    assert shifts(reward_band=(0.3, 0.5)) == pytest.approx(expected, abs=2e-4)


def test_without_a_reward_nothing_is_shifted():
    """The table's fixed point is the ODE's end point."""
    assert max(map(abs, shifts(weights={"reward": 0.0}))) < 2e-4
