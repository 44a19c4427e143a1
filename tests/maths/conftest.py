"""Closed-form networks for the tests of this room, and seeded draws that remember their addresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.maths.paths import FlowPath, Path, expand, x0_from_velocity

F64 = torch.float64


class Cond(dict[str, Tensor]):
    """The two things guidance asks of a condition: named rows that can be stacked."""

    @staticmethod
    def cat(conds: list[Cond]) -> Cond:
        return Cond({name: torch.cat([c[name] for c in conds]) for name in conds[0]})


@dataclass
class Network:
    """Any function `net(native state, timestep [rows, 1...], cond)` shown as a flow network on `path`."""

    path: Path
    net: Callable[[Tensor, Tensor, Any], Tensor]
    calls: list[int] = field(default_factory=list)

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.calls.append(len(x))
        label = expand(self.path.timestep(t), x)
        return self.path.velocity(self.net(self.path.native(x, t), label, cond), x, t)

    def x0(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return x0_from_velocity(x, self.velocity(x, t, cond), t)

    def null(self, cond: Any) -> Any:
        return Cond(label=torch.zeros_like(cond["label"]))


@dataclass
class Gaussian:
    """Data N(mean, std^2): v = -m + (t - (1-t) s^2)/A (x - (1-t) m), A = (1-t)^2 s^2 + t^2."""

    mean: float = 0.7
    std: float = 0.6
    path: Path = field(default_factory=FlowPath)

    def variance(self, t: Any) -> Any:
        return (1 - t) ** 2 * self.std**2 + t**2

    def velocity(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        t = expand(t, x)
        return -self.mean + (t - (1 - t) * self.std**2) / self.variance(t) * (x - (1 - t) * self.mean)

    def x0(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        return x0_from_velocity(x, self.velocity(x, t), t)

    def transport(self, x: Tensor, t: float, u: float) -> Tensor:
        """Where the probability-flow ODE takes x from t to u."""
        ratio = (self.variance(u) / self.variance(t)) ** 0.5
        return (1 - u) * self.mean + ratio * (x - (1 - t) * self.mean)


@dataclass
class Draws:
    """Standard normals by name, in float64 unless said; a name drawn twice fails."""

    rows: int = 3
    dtype: torch.dtype = F64
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def normal(self, name: str, *shape: int) -> Tensor:
        assert name not in self.drawn, name
        generator = torch.Generator().manual_seed(len(self.drawn))
        self.drawn[name] = torch.randn(self.rows, *shape, generator=generator, dtype=self.dtype)
        return self.drawn[name]


@pytest.fixture
def oracle() -> SimpleNamespace:
    """Network, Gaussian, Draws and Cond by attribute."""
    return SimpleNamespace(Network=Network, Gaussian=Gaussian, Draws=Draws, Cond=Cond)


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """`normal(*shape)`: float64 standard normals from one seeded generator a test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)


SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@pytest.fixture
def sd() -> dict[str, Any]:
    """The betas of Stable Diffusion."""
    return dict(SD)
