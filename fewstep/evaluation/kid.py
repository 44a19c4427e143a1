"""Kernel Inception Distance (Binkowski et al. 2018, arXiv 1801.01401): squared MMD under k(x, y) = (x y / d + 1)^3.

    KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

It is unbiased, so its expectation does not depend on set sizes and it may fall below 0. Everything is float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # those of torch-fidelity, whose draws are repeated number by number
_BLOCK = 1024  # rows of the kernel matrix held at a time


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> dict[str, float]:
    """`kid`: mean over random subsets of both sets (real [n, d], fake [m, d]); `kid_std`: over the subsets.

    Subsets have `size` rows, or all of the smaller set. UserError below two rows.
    """
    size = min(size, len(real), len(fake))
    draws = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        of_fake = draws.choice(len(fake), size, replace=False)
        of_real = draws.choice(len(real), size, replace=False)
        found.append(squared_mmd(real[of_real], fake[of_fake]))
    return {"kid": float(np.mean(found)), "kid_std": float(np.std(found))}


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate from all pairs of x [n, d] and y [m, d], by blocks: memory grows with n + m only."""
    if min(len(x), len(y)) < 2:
        raise UserError(f"kid needs at least 2 samples of each set, not {len(x)} and {len(y)}: raise n")
    x, y = x.double(), y.double()
    return (_among(x) + _among(y) - 2 * _sum(x, y) / (len(x) * len(y))).item()


def _among(x: Tensor) -> Tensor:
    """Mean kernel of different rows."""
    own = (x.square().mean(1) + 1).pow(3).sum()
    return (_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _sum(x: Tensor, y: Tensor) -> Tensor:
    rows = [(part @ y.T / x.shape[1] + 1).pow(3).sum() for part in x.split(_BLOCK)]
    return torch.stack(rows).sum()
