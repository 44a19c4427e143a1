"""What consistency methods share: the grid they walk, the boundary of f, and the teacher's walk over one interval.

f(x_t, t) is the student's guess of where the teacher's trajectory through x_t ends. It is trained to agree along the
trajectory, f(x_t, t) = f(x_s, s) with s < t and x_s made from x_t by the teacher, and pinned by f(x, 0) = x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .paths import Path, VPPath, expand

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of LCM's boundary (arXiv 2310.04378), on integer timesteps
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def pick(levels: Sequence[float], steps: int) -> tuple[float, ...]:
    """Every so-manyth of decreasing `levels`: indices floor(i n / steps), as LCMScheduler picks from its own grid.

    Of the 50 levels 999, 979, ..., 19 of a table of 1000: 4 steps give 999, 759, 499, 259.
    """
    return tuple(levels[i * len(levels) // steps] for i in range(steps))


def below(u: Tensor, path: Path, count: int, skip: float | None = None) -> Tensor:
    """The clock value that each u is compared with: `skip` lower, by default one level of a grid of `count`; at least 0.

    On DDPM tables 0 is the entry k = 0, whose sample is not quite clean (abar_0 = .99915 for Stable Diffusion).
    """
    width = skip if skip is not None else (1.0 if isinstance(path, VPPath) else path.grid(1)[0]) / count
    lower = u - width
    return torch.where(lower > 1e-6, lower, torch.zeros_like(lower))


def boundary(path: Path, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """f(x, t) = c_skip x + c_out x0 with f(x, 0) = x; x is the flow state, x0 the network's clean prediction there.

    Flow: x0 = x - t v is x at t = 0 already, so c_skip = 0 and c_out = 1. DDPM tables (LCM, arXiv 2310.04378): with
    q = 10 k, c_skip = .25 / (q^2 + .25) on the native state and c_out = q / sqrt(q^2 + .25).
    """
    if not isinstance(path, VPPath):
        return x0
    skip, out = lcm_scalings(path.timestep(t.double()))
    return expand(skip, x) * path.native(x, t) + expand(out, x) * x0


def lcm_scalings(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at integer or fractional timesteps."""
    q = TIMESTEP_SCALING * timestep
    spread = q**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / spread, q / spread.sqrt()


def walk(
    x: Tensor, u: Tensor, u_next: Tensor, path: Path, x0: Callable[[Tensor, Tensor], Tensor], step: Step, substeps: int
) -> Tensor:
    """The state at clock u_next [rows] reached from x at u [rows] in `substeps` equal parts of the clock.

    x0(x, t) is the teacher's clean prediction, step(x, x0, t, t_next, j) one move of the solver; times are float64 for
    the solver's coefficients and float32 for the network. A row whose u_next is 0 ends at path.t_min.
    """
    edges = [u + (u_next - u) * (j / substeps) for j in range(substeps)] + [u_next]
    times = [path.time(edge.double()) for edge in edges]
    for j in range(substeps):
        x = step(x, x0(x, times[j].float()), times[j], times[j + 1], j)
    return x


def ode_step(x: Tensor, x0: Tensor, t: Tensor, t_next: Tensor, _part: int = 0) -> Tensor:
    """DDIM, which on flow states is Euler: x0 + (t_next / t) (x - x0)."""
    return x0 + expand(t_next / t, x) * (x - x0)


def karras_times(
    path: Path, count: int, sampled: Sequence[float], low: float, high: float, rho: float = 7.0
) -> tuple[Tensor, Tensor]:
    """Flow times of a consistency model's grid and their sigma = t / (1 - t), decreasing, [n] float64 each.

    sigma^(1/rho) is evenly spaced over `count` points from high to low (EDM, arXiv 2206.00364, eq. 5), within what the
    path reaches. The first point is path.t_max, pure noise on flow paths, and counts as sigma = high. Each time in
    `sampled` (the first is t_max) takes the place of the point nearest to it. The last entry is path.t_min, where f is
    the identity.
    Raises UserError when a sampled time besides t_max lies above `high`.
    """
    low, high = max(low, _sigma(path.t_min)), min(high, _sigma(path.t_max))
    levels = torch.tensor(sorted(_sigma(t) for t in set(sampled)), dtype=torch.float64)
    if len(levels) > 1 and levels[-2] >= high:
        raise UserError(f"sigma_max={high:g} is below {levels[-2]:.4g}, a level that is sampled at: raise it")
    levels = levels.clamp(max=high)
    points = torch.linspace(high ** (1 / rho), low ** (1 / rho), count, dtype=torch.float64) ** rho
    taken = (points[:, None].log() - levels.log()).abs().argmin(0)
    rest = points[torch.ones(count, dtype=torch.bool).index_fill(0, taken, False)]
    sigma = torch.cat([levels, rest]).sort(descending=True)[0]
    t = torch.where(sigma == high, path.t_max, sigma / (1 + sigma))
    above = t > path.t_min * (1 + 1e-6)
    end = torch.tensor([path.t_min], dtype=torch.float64)
    return torch.cat([t[above], end]), torch.cat([sigma[above], end / (1 - end)])


def lognormal_shares(sigma: Tensor, mean: float, std: float) -> Tensor:
    """Probability [n - 1] of each pair of neighbours in decreasing `sigma` [n] when log sigma is N(mean, std^2).

    Proportional to erf((log sigma_i - mean) / (sqrt 2 std)) - erf((log sigma_{i+1} - mean) / (sqrt 2 std))
    (improved consistency training, arXiv 2310.14189, eq. 10); what lies outside the grid is left out.
    """
    mass = torch.erf((sigma.log() - mean) / (math.sqrt(2) * std))
    share = mass[:-1] - mass[1:]
    return share / share.sum()


def doubled(step: int, start: int, end: int, every: int) -> int:
    """min(start * 2^floor(step / every), end): the number of levels grows over training (arXiv 2310.14189, eq. 11)."""
    return min(start * 2 ** min(step // every, 62), end)


def noised_further(x: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A state at t [rows] whose law given the state x at s <= t is the forward process': c x + sqrt(t^2 - c^2 s^2) noise.

    c = (1 - t) / (1 - s), so that (1 - s) x0 + s eps becomes (1 - t) x0 + t eps'. At t = 1 it is the noise itself.
    """
    s, t = s.double(), t.double()
    keep = (1 - t) / (1 - s)
    return expand(keep, x) * x + expand((t**2 - (keep * s) ** 2).clamp_min(0).sqrt(), x) * noise


def _sigma(t: float) -> float:
    return math.inf if t >= 1 else t / (1 - t)
