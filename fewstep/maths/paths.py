"""Noise paths. Every network is shown as a flow network on y_t = (1 - t) x0 + t eps, v = eps - x0, t = 1 is noise.

A path knows how its native process (variance preserving, TrigFlow, EDM, or flow itself) hangs together with y: the
native state alpha x0 + sigma eps is `scale(t) * y` with scale = alpha + sigma and t = sigma / (alpha + sigma), an exact
change of variables. Times are drawn and grids are written on the path's clock u in [0, 1], `t = path.time(u)`.

    path = VPPath.from_scheduler(pipeline.scheduler.config)
    t = path.time(draw.uniform("u"))                           # [rows]
    output = network(path.native(y, t), path.timestep(t))
    v = path.velocity(output, y, t)

Functions of time take a float or a Tensor, compute in float64 and answer in the type they were given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .clocks import Number, shift, unshift
from .path import Path, in_float64
from .tables import alphas_cumprod
from .variables import (
    PREDICTIONS,
    ROTATED,
    Parameterisation,
    add_noise,
    eps_from_velocity,
    expand,
    rotation,
    score_from_velocity,
    x0_from_velocity,
)

__all__ = [
    "EDMPath",
    "FlowPath",
    "Path",
    "TrigFlowPath",
    "VPPath",
    "add_noise",
    "eps_from_velocity",
    "expand",
    "score_from_velocity",
    "x0_from_velocity",
]


@dataclass(frozen=True)
class FlowPath(Path):
    """Rectified flow: the native state is y, the output is v, and t = shift(u).

    num_train_timesteps: the label is this times t (1 for networks that take t itself).
    integer_timesteps: the label is floored, as DPMSolverMultistepScheduler(use_flow_sigmas=True, solver_order=1) does
        on the levels of `Schedule.uniform(steps, start=0.999)`; equal to it for up to 20 steps.
    zero_signal: sampling starts at t_max from t_max * noise, a state whose clean part is zero (SiD, arXiv 2404.04057).
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    integer_timesteps: bool = False
    t_max: float = 1.0
    t_min: float = 0.0
    zero_signal: bool = False

    def native(self, y: Tensor, t: Number) -> Tensor:
        """y itself."""
        return y

    def start(self, noise: Tensor) -> Tensor:
        """The noise itself, or t_max times it."""
        return self.t_max * noise if self.zero_signal else noise

    def _time(self, u: Tensor) -> Tensor:
        return shift(u, self.shift)

    def _clock(self, t: Tensor) -> Tensor:
        return unshift(t, self.shift)

    def _timestep(self, t: Tensor) -> Tensor:
        label = t * self.num_train_timesteps
        if not self.integer_timesteps:
            return label
        # A float32 t misses the integer it stands for by up to 6e-5, and the scheduler's float64 sigma = 1 - (1 - t)
        # falls below some of them (.333 is fed as 332): whole labels take the scheduler's rounding.
        whole = label.round()
        theirs = (1 - (1 - whole / self.num_train_timesteps)) * self.num_train_timesteps
        return torch.where((label - whole).abs() < 1e-4, theirs, label).floor()


@dataclass(frozen=True)
class VPPath(Path):
    """Variance preserving: x_k = sqrt(abar_k) x0 + sqrt(1 - abar_k) eps, k = 0 .. K-1 (DDPM, Stable Diffusion).

    The clock is k = K u; between table entries log(sigma / alpha) is linear in k, so u -> t -> u is exact, u above
    (K-1)/K means the last entry. The label is k, fractional where t lies between entries.
    Raises UserError for an unknown prediction_type and for epsilon-prediction with a table that ends at abar = 0.
    """

    alphas_cumprod: tuple[float, ...]
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64)
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        if self.prediction_type not in PREDICTIONS:
            hint = nearest(self.prediction_type, PREDICTIONS)
            raise UserError(f"unknown prediction_type '{self.prediction_type}' in the scheduler config: {hint}")
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] <= 0:
            raise UserError("epsilon prediction cannot start at zero terminal SNR: use prediction_type v_prediction")

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> VPPath:
        """The path of a diffusers scheduler config (beta tables in float64)."""
        return cls(tuple(alphas_cumprod(config).tolist()), config.get("prediction_type", "epsilon"))

    @cached_property
    def t_min(self) -> float:
        """Flow time of k = 0."""
        return torch.sigmoid(self._table("cpu")[0]).item()

    @cached_property
    def t_max(self) -> float:
        """Flow time of k = K-1."""
        return torch.sigmoid(self._table("cpu")[-1]).item()

    def start(self, noise: Tensor) -> Tensor:
        """noise / scale(t_max): the native process starts from unit noise, as DDIM and LCM schedulers do."""
        return noise / self.scale(self.t_max)

    def grid(self, steps: int) -> tuple[float, ...]:
        """k / K for the `trailing` timesteps k = round(K (1 - i / steps)) - 1 of diffusers, e.g. 999, 749, 499, 249."""
        count = len(self.alphas_cumprod)
        width = (count - count / steps) - count  # arange's own rounding decides between neighbours at k + 1/2
        return tuple((round(count + i * width) - 1) / count for i in range(steps))

    @property
    def _parameterisation(self) -> Parameterisation:
        return PREDICTIONS[self.prediction_type]

    def _table(self, device: torch.device | str) -> Tensor:
        """log(sigma / alpha) over k, [K] float64. The cap stands for abar = 0: sigmoid(40) is 1 in float64."""
        key = torch.device(device)
        if key not in self._tables:
            abar = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
            self._tables[key] = ((torch.log1p(-abar) - torch.log(abar)) / 2).clamp(-40, 40).to(key)
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def _time(self, u: Tensor) -> Tensor:
        table = self._table(u.device)
        k = (u * len(table)).clamp(0, len(table) - 1)
        low = k.detach().floor().long().clamp(max=len(table) - 2)
        return torch.sigmoid(torch.lerp(table[low], table[low + 1], k - low))

    def _clock(self, t: Tensor) -> Tensor:
        table = self._table(t.device)
        level = torch.logit(t).clamp(table[0], table[-1])
        low = (torch.searchsorted(table, level.detach().contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        return (low + (level - table[low]) / (table[low + 1] - table[low])) / len(table)

    def _scale(self, t: Tensor) -> Tensor:
        return 1 / rotation(t)

    def _timestep(self, t: Tensor) -> Tensor:
        k = self._clock(t) * len(self.alphas_cumprod)
        # float32 t tells k to about 1e-4 only; the entry itself is what the network was trained on.
        snap = torch.where((k - k.round()).abs() < 1e-3, k.round() - k, torch.zeros_like(k))
        return k + snap.detach()


@dataclass(frozen=True)
class TrigFlowPath(Path):
    """TrigFlow (Lu & Song, arXiv 2410.11081): native x = sigma_data (cos a x0 + sin a eps), a in [0, pi/2].

    t = sin a / (sin a + cos a), clock u = a / (pi/2), label a. The output is F = cos a eps - sin a x0, so that
    x0 = cos a x / sigma_data - sin a F. Flow states are in the data's own units divided by sigma_data (unit variance):
    the native state is `sigma_data` times larger and the network is fed native / sigma_data.
    """

    sigma_data: float = 1.0

    def input_scale(self, t: Number) -> Number | float:
        """1 / sigma_data."""
        return 1 / self.sigma_data

    @property
    def _parameterisation(self) -> Parameterisation:
        return ROTATED

    def _time(self, u: Tensor) -> Tensor:
        angle = u * (math.pi / 2)
        return angle.sin() / (angle.sin() + angle.cos())

    def _clock(self, t: Tensor) -> Tensor:
        return self._timestep(t) / (math.pi / 2)

    def _scale(self, t: Tensor) -> Tensor:
        return self.sigma_data / rotation(t)

    def _timestep(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t)


@dataclass(frozen=True)
class EDMPath(Path):
    """EDM (Karras et al., arXiv 2206.00364): native x = x0 + sigma eps, t = sigma / (1 + sigma), label ln(sigma) / 4.

    Clock: sigma^(1/rho) is linear in u, from sigma_min to sigma_max (eq. 5). The output is F in
    x0 = c_skip x + c_out F(c_in x, label), with the paper's table 1 for c_skip, c_out, c_in.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    @property
    def t_min(self) -> float:
        """sigma_min / (1 + sigma_min)."""
        return self.sigma_min / (1 + self.sigma_min)

    @property
    def t_max(self) -> float:
        """sigma_max / (1 + sigma_max)."""
        return self.sigma_max / (1 + self.sigma_max)

    def input_scale(self, t: Number) -> Number | float:
        """c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return in_float64(lambda w: ((w / (1 - w)) ** 2 + self.sigma_data**2) ** -0.5, t)

    def start(self, noise: Tensor) -> Tensor:
        """t_max * noise: the native process starts from sigma_max * noise."""
        return self.t_max * noise

    @cached_property
    def _parameterisation(self) -> Parameterisation:
        return Parameterisation(
            lambda o, y, t: (y - self._skip(t) * y - self._out(t) * o) / t,
            lambda v, y, t: (y - t * v - self._skip(t) * y) / self._out(t),
            lambda x0, eps, t: (x0 - self._skip(t) * add_noise(x0, eps, t)) / self._out(t),
        )

    def _skip(self, t: Tensor) -> Tensor:
        """c_skip (1 + sigma): what x0 takes from the flow state."""
        sigma = t / (1 - t)
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2) * (1 + sigma)

    def _out(self, t: Tensor) -> Tensor:
        sigma = t / (1 - t)
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2) ** 0.5

    def _time(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = (low + u * (high - low)) ** self.rho
        return sigma / (1 + sigma)

    def _clock(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((t / (1 - t)) ** (1 / self.rho) - low) / (high - low)

    def _scale(self, t: Tensor) -> Tensor:
        return 1 / (1 - t)

    def _timestep(self, t: Tensor) -> Tensor:
        return torch.logit(t) / 4
