"""Mixing of samples: pairs within groups, mixup and CutMix as one map of weights, and the quantiles of Beta(a, a)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def partners_within(group: Tensor, key: Tensor) -> Tensor:
    """A random partner of the same group for each row: positions [rows] int64, a permutation that never leaves a group.

    Nobody is its own partner unless alone in the group. group [rows] int64; key [rows] random numbers that decide.
    """
    by_key = key.argsort()
    ring = by_key[group[by_key].argsort(stable=True)]  # groups one after the other, each in random order
    sorted_group = group[ring]
    first = torch.searchsorted(sorted_group, sorted_group)
    place = torch.arange(len(ring), device=ring.device)
    size = torch.searchsorted(sorted_group, sorted_group, right=True) - first
    following = ring[first + (place - first + 1) % size]
    return torch.empty_like(ring).scatter(0, ring, following)


def beta_quantile(u: Tensor, a: float) -> Tensor:
    """The number below which Beta(a, a) lies with probability u in [0, 1], any shape; error below 1e-6 for a >= 1/2."""
    table = _beta_table(a).to(u.device, non_blocking=True)
    right = torch.searchsorted(table, u.double().contiguous()).clamp(1, len(table) - 1)
    low, high = table[right - 1], table[right]
    share = (u - low) / (high - low)
    angle = (right - 1 + share) * (torch.pi / 2 / (len(table) - 1))
    return angle.sin().square().to(u.dtype)


@lru_cache(maxsize=8)
def _beta_table(a: float, size: int = 4096) -> Tensor:
    """P(X <= sin^2 angle) on even angles in [0, pi/2]; in the angle the density (sin cos)^(2a - 1) is bounded."""
    step = torch.pi / 2 / size
    middle = (torch.arange(size, dtype=torch.float64) + 0.5) * step
    mass = (middle.sin() * middle.cos()).pow(2 * a - 1)
    total = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    return total / total[-1]


def cutmix_map(share: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """0 inside a box of the image's shape that covers 1 - share of it, 1 outside: [rows, 1, height, width].

    share [rows] in [0, 1]; centre [rows, 2] (y, x) in [0, 1]. The box is cut off at the border and rounded to whole
    pixels, so the true share is the map's mean (CutMix, arXiv 1905.04899).
    """
    side = (1 - share).sqrt()[:, None]
    size = torch.tensor([height, width], device=share.device)
    start = ((centre - side / 2) * size).round()
    end = ((centre + side / 2) * size).round()
    inside = [_within(start[:, i], end[:, i], n) for i, n in enumerate((height, width))]
    return 1 - (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()


def _within(start: Tensor, end: Tensor, n: int) -> Tensor:
    place = torch.arange(n, device=start.device)
    return (place >= start[:, None]) & (place < end[:, None])
