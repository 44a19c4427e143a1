"""Rectified flow on a logarithmic clock, for few-step grids that crowd near the data (protein backbones)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .paths import FlowPath

DECADES = 5  # of t between u = 1 and u = 0
PER_DECADE = 200  # grid positions: t = 10^(-k / 200), k whole
LAST = 400  # k of the last level, t = .01


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
