"""What consistency methods share: the grid they walk, the boundary of f, and the teacher's walk over one interval.

f(x_t, t) is the student's guess of where the teacher's trajectory through x_t ends. It is trained to agree along the
trajectory, f(x_t, t) = f(x_s, s) with s < t and x_s made from x_t by the teacher, and pinned by f(x, 0) = x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
