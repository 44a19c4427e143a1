"""How times are spread: training-time samplers made from uniform or normal draws, and the shift of flow models.

A clock value u lies in [0, 1] with 1 = noise; a path turns it into flow time with `path.time(u)`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def shift(u: Number, factor: float) -> Number:
    """t = S u / (1 + (S - 1) u): moves [0, 1] towards noise for S > 1 (Esser et al., arXiv 2403.03206, eq. 23)."""
    return factor * u / (1 + (factor - 1) * u)


def unshift(t: Number, factor: float) -> Number:
    """The inverse of `shift`: u = t / (S - (S - 1) t)."""
    return t / (factor - (factor - 1) * t)


def dynamic_mu(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base: float = 0.5, largest: float = 1.15
) -> float:
    """FLUX's mu for an image of `tokens` patches: a line through (base_tokens, base) and (max_tokens, largest).

    The shift factor is exp(mu); see `dynamic_shift`.
    """
    slope = (largest - base) / (max_tokens - base_tokens)
    return base + slope * (tokens - base_tokens)


def dynamic_shift(u: Number, mu: float) -> Number:
    """t = e^mu / (e^mu + 1/u - 1), the exponential time shift of FLUX; equal to `shift(u, e^mu)`."""
    return shift(u, math.exp(mu))


def uniform(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Clock values uniform on [low, high] from u uniform on [0, 1]."""
    return low + (high - low) * u


def logit_normal(z: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Clock values sigmoid(mean + std z) from z standard normal (arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + std * z)


def discrete(u: Tensor, n: int) -> Tensor:
    """Clock values k / n, with k uniform on 0..n-1, from u uniform on [0, 1]: the integer timesteps of a table of n."""
    return (u * n).floor().clamp(0, n - 1) / n
