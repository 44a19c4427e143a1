"""Rectified flow on the clock of TrigFlow's angle, as SANA-Sprint is sampled (arXiv 2503.09641, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .paths import FlowPath

SECOND_ANGLE = 1.3  # radians; of two steps, the second in SCMScheduler


@dataclass(frozen=True)
class AngleFlowPath(FlowPath):
    """t = sin a / (sin a + cos a), u = a / (pi/2); states and velocities are those of `FlowPath`, the label is t.

    TrigFlow's state is x = sigma (cos a x0 + sin a eps) and its answer F = cos a eps - sin a x0. A network that is fed
    x / sigma sqrt(t^2 + (1-t)^2) = (1-t) x0 + t eps, and whose answer v becomes F = ((1-2t) y + (1-2t+2t^2) v) /
    sqrt(t^2 + (1-t)^2), is a flow network: neither sigma nor the angle is left, but for the levels.

    The grid of N levels is evenly spaced in the angle; that of 2 is pi/2 and 1.3.
    """

    num_train_timesteps: int = 1

    def grid(self, steps: int) -> tuple[float, ...]:
        """Clock values of N levels, as SCMScheduler has them."""
        return (self.clock(self.t_max), SECOND_ANGLE / (math.pi / 2)) if steps == 2 else super().grid(steps)

    def _time(self, u: Tensor) -> Tensor:
        angle = u * (math.pi / 2)
        return angle.sin() / (angle.sin() + angle.cos())

    def _clock(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t) / (math.pi / 2)
