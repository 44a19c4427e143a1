"""The base of all noise paths: how a native process hangs together with the flow state and its clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .clocks import Number
from .variables import FLOW, Parameterisation, expand


@dataclass(frozen=True)
class Path:
    """Base of all paths; y [rows, ...] is the flow state, t [rows] (or one number) the flow time.

    t_min, t_max: where the native process begins and ends. `time` stays within them.
    """

    @property
    def t_min(self) -> float:
        """Smallest time the network was trained at."""
        return 0.0

    @property
    def t_max(self) -> float:
        """Largest time the network was trained at; sampling starts here."""
        return 1.0

    def time(self, u: Number) -> Number:
        """Flow time at clock value u."""
        return in_float64(lambda w: self._time(w).clamp(self.t_min, self.t_max), u)

    def clock(self, t: Number) -> Number:
        """Clock value at flow time t, the inverse of `time`."""
        return in_float64(self._clock, t)

    def scale(self, t: Number) -> Number:
        """alpha + sigma of the native process: native state = scale(t) * y."""
        return in_float64(self._scale, t)

    def timestep(self, t: Number) -> Number:
        """The label that the network is fed."""
        return in_float64(self._timestep, t)

    def input_scale(self, t: Number) -> Number | float:
        """What the native state is multiplied by on its way into the network (EDM's c_in); 1 on most paths."""
        return 1.0

    def native(self, y: Tensor, t: Number) -> Tensor:
        """Native state scale(t) * y."""
        return expand(self.scale(t), y) * y

    def start(self, noise: Tensor) -> Tensor:
        """The flow state that sampling starts from at t_max, given standard normal noise [rows, ...]."""
        return noise

    def grid(self, steps: int) -> tuple[float, ...]:
        """Clock values of a plain `steps`-level schedule, evenly spaced from t_max; the last step goes to t = 0."""
        top = self.clock(self.t_max)
        return tuple(top * (1 - i / steps) for i in range(steps))

    def velocity(self, output: Tensor, y: Tensor, t: Tensor | float) -> Tensor:
        """v = eps - x0 from the network's output at flow state y."""
        return self._parameterisation.velocity(output, y, expand(t, y))

    def output(self, velocity: Tensor, y: Tensor, t: Tensor | float) -> Tensor:
        """The network output that means `velocity`; the inverse of `velocity`."""
        return self._parameterisation.output(velocity, y, expand(t, y))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The output that is right for the pair (x0, eps): |output - target|^2 is the network's own loss."""
        return self._parameterisation.target(x0, eps, expand(t, x0))

    @property
    def _parameterisation(self) -> Parameterisation:
        return FLOW

    def _time(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _clock(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _timestep(self, t: Tensor) -> Tensor:
        raise NotImplementedError


def in_float64(function: Callable[[Tensor], Tensor], value: Number) -> Number:
    """`function` of a float64 tensor applied to a float or tensor of any dtype; the answer has the type of `value`."""
    if not isinstance(value, Tensor):
        return function(torch.tensor(value, dtype=torch.float64)).item()
    dtype = value.dtype if value.is_floating_point() else torch.float32
    return function(value.double()).to(dtype)
