"""Flow maps of points that read their duration from the call, and FreeFlow on them; data N(m, s^2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.maths.paths import FlowPath, Path
from fewstep.methods.diffusion.freeflow import FreeFlow
from fewstep.models.oracle import GAUSSIAN
from fewstep.nets.extra_inputs import fed
from tests.oracles.harness import seat

M, S = 0.8, 0.6


def spread(t: Any, std: float = S) -> Any:
    """a(t) = sqrt((1-t)^2 s^2 + t^2)."""
    return ((1 - t) ** 2 * std**2 + t**2) ** 0.5


def gaussian(mean: float = M, std: float = S, null_mean: float | None = None) -> nn.Module:
    """The closed-form velocity of N(mean, std^2)."""
    null = [mean if null_mean is None else null_mean]
    return GAUSSIAN.build(means=[[mean]], std=[std], null_mean=null, null_std=std).module


class Reads(nn.Module):
    """What tells a Denoiser which fields of the condition are the network's."""

    def __init__(self, *names: str):
        super().__init__()
        self.names = names


class ExactMap(nn.Module):
    """V*(z, d) = -m + gain(d) z with gain = (1 - a(1-d)) / d, written without the division: z - m at d = 0."""

    def __init__(self, mean: float = M, std: float = S):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))
        self.extra_inputs, self.dim, self.null = Reads("delta"), 1, 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """V at x [rows, 1]."""
        delta = fed("delta")[:, None]
        gain = (2 - delta * (1 + self.std**2)) / (1 + ((self.std * delta) ** 2 + (1 - delta) ** 2) ** 0.5)
        return gain * x - self.mean


class Polynomial(nn.Module):
    """V = sum_k (b_k + g_k z) T_k(2 d - 1): linear in z, Chebyshev polynomials up to `degree` in the duration."""

    def __init__(self, degree: int = 6):
        super().__init__()
        self.offset, self.gain = nn.Parameter(torch.zeros(degree + 1)), nn.Parameter(torch.zeros(degree + 1))
        self.extra_inputs, self.dim, self.null = Reads("delta"), 1, 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """V at x [rows, 1]."""
        place = 2 * fed("delta") - 1
        basis = [torch.ones_like(place), place]
        while len(basis) < len(self.gain):
            basis.append(2 * place * basis[-1] - basis[-2])
        return (
            torch.stack(basis, 1) @ torch.stack([self.offset, self.gain], 1) * torch.cat([torch.ones_like(x), x], 1)
        ).sum(1, keepdim=True)


def freeflow(networks: dict[str, nn.Module] | None = None, path: Path | None = None, **config: Any) -> FreeFlow:
    """The method, unguided unless told, on the closed-form teacher, the exact student and its exact velocity."""
    method = FreeFlow(FreeFlow.Config(**{"guidance_scale": 1.0, **config}))
    exact = {"teacher": gaussian(), "student": ExactMap(), "fake_velocity": gaussian(), **(networks or {})}
    seat(method, {role.name: exact[role.name] for role in method.roles()}, path or FlowPath())
    return method
