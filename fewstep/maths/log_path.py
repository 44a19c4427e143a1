"""Rectified flow on a logarithmic clock, for few-step grids that crowd near the data (protein backbones)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .paths import FlowPath
from .solvers import Schedule

DECADES = 5  # of t between u = 1 and u = 0
PER_DECADE = 200  # grid positions: t = 10^(-k / 200), k whole
FIRST, LAST = 30, 400  # k of distilled Proteina's first level, t = .708, and last, .01
ALONE = 40  # k of a single level, t = .631; the released generators of one step are called at .63


@dataclass(frozen=True)
class LogFlowPath(FlowPath):
    """t = 10^(-5 (1 - u)); states and velocities are those of `FlowPath`.

    The grid of N levels is t_i = 10^(-k_i / 200) with k_i = round(linspace(k_1, 400, N)), where t_max = 10^(-k_1 / 200):
    the levels of distilled Proteina, .708 .. .010 for k_1 = 30.
    """

    num_train_timesteps: int = 1

    @property
    def first(self) -> int:
        """k of the first level."""
        return round(-PER_DECADE * math.log10(self.t_max))

    def grid(self, steps: int) -> tuple[float, ...]:
        """Clock values of N levels, from t_max to .01; one level is t_max alone."""
        positions = torch.linspace(self.first, LAST, steps, dtype=torch.float64).round()
        return tuple((1 - positions / (DECADES * PER_DECADE)).tolist())

    def _time(self, u: Tensor) -> Tensor:
        return torch.pow(10.0, -DECADES * (1 - u))

    def _clock(self, t: Tensor) -> Tensor:
        return 1 + torch.log10(t) / DECADES


def teacher_schedule(
    path: LogFlowPath, steps: int, noise_scale: float = 0.45, renewal: float | None = None
) -> Schedule:
    """Proteina's: velocity and score together on levels 1 - t = 1 - 10^(-2 k / N), stretched to end at 0.

    noise_scale: factor of the noise's variance. renewal: largest share of the noise that a step replaces.
    """
    levels = [(10 ** (-2 * k / steps) - 0.01) / 0.99 for k in range(steps)]
    return Schedule("sde", tuple(path.clock(t) for t in levels), noise_scale=noise_scale, renewal=renewal)


def few_step_schedule(path: LogFlowPath, steps: int, noise_scale: float = 0.45) -> Schedule:
    """Distilled Proteina's: noise, of which `noise_scale` is a factor of the standard deviation, anew on `path.grid`."""
    return Schedule("renoise", path.grid(steps), noise_scale=noise_scale)
