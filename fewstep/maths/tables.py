"""Cumulative signal tables of variance-preserving models, in float64, from any diffusers scheduler config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest

F64 = torch.float64


def _linear(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=F64)


def _scaled_linear(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low**0.5, high**0.5, n, dtype=F64) ** 2


def _cosine(_low: float, _high: float, n: int) -> Tensor:
    grid = torch.arange(n + 1, dtype=F64) / n
    level = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


def _sigmoid(low: float, high: float, n: int) -> Tensor:
    return torch.sigmoid(torch.linspace(-6, 6, n, dtype=F64)) * (high - low) + low


BETAS: Mapping[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
}


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """abar_k = prod_{j <= k} (1 - beta_j), [num_train_timesteps] float64.

    Reads beta_schedule, beta_start, beta_end, trained_betas, num_train_timesteps and rescale_betas_zero_snr.
    Raises UserError for an unknown beta_schedule.
    """
    trained = config.get("trained_betas")
    if trained is not None:
        abar = torch.cumprod(1 - torch.as_tensor(trained, dtype=F64), 0)
    else:
        name = config.get("beta_schedule", "linear")
        if name not in BETAS:
            raise UserError(f"unknown beta_schedule '{name}' in the scheduler config: {nearest(name, BETAS)}")
        low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        abar = torch.cumprod(1 - BETAS[name](low, high, int(config.get("num_train_timesteps", 1000))), 0)
    return zero_terminal_snr(abar) if config.get("rescale_betas_zero_snr") else abar


def zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shifts and scales sqrt(abar) so that it ends at 0 and starts as before (Lin et al., arXiv 2305.08891, alg. 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
