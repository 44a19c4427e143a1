"""Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al., 2002.09797).

R_i and F_j are the distances of real i and fake j to their k-th neighbour within their own set. With strict <:

    precision = mean_j [some i: |f_j - r_i| < R_i]        recall   = mean_i [some j: |f_j - r_i| < F_j]
    density   = sum_ij [|f_j - r_i| < R_i] / (k M)        coverage = mean_i [min_j |f_j - r_i| < R_i]

Two samples of one distribution, equal in size, have a coverage of about 1 - 2^-k. Distances are float64 and direct:
the matrix-product form loses three digits and gives points a distance to themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

_BLOCK = 1024  # rows of the distance matrix held at a time


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of features `fake` [m, d] against `real` [n, d].

    Raises UserError when a set has no k-th neighbour.
    """
    for name, rows in (("real", real), ("generated", fake)):
        if not 0 < k < len(rows):
            raise UserError(f"prdc with k={k} needs more than {k} {name} samples, not {len(rows)}: raise n or lower k")
    real, fake = real.double(), fake.double()
    real_radii, fake_radii = neighbour_radii(real, k), neighbour_radii(fake, k)
    inside = torch.zeros(len(fake), dtype=torch.int64)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    closest = torch.full((len(real),), torch.inf, dtype=torch.float64)
    for rows in torch.arange(len(fake)).split(_BLOCK):
        gap = distances(fake[rows], real)
        inside[rows] = (gap < real_radii).sum(1)
        recalled |= (gap < fake_radii[rows, None]).any(0)
        closest = torch.minimum(closest, gap.amin(0))
    return {
        "precision": (inside > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": inside.double().mean().item() / k,
        "coverage": (closest < real_radii).double().mean().item(),
    }


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """Distance [n] of each row to its k-th nearest other row."""
    parts = [distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(_BLOCK)]  # rank 1 is the row itself
    return torch.cat(parts)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [n, m], summed term by term."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
