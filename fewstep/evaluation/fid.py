"""Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500).

    FID = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

The value is biased upwards by about (1/n1 + 1/n2) (d + d (d + 1) / 4) for features that are N(0, I_d), so scores with
different set sizes are never compared. Everything is float64.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError

_ROWS = 1024  # rows of a set that are held in float64 at once


class Moments:
    """Mean and covariance of a stream of features [*, d], in float64.

    Holds count, mean, and the scatter sum (x - mean)(x - mean)^T. Two streams, batches or ranks alike, are joined by
    the update of Chan, Golub and LeVeque (1979), which loses no digits when the mean is large against the spread.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of one set [n, d], taken in parts."""
        made = cls(features.shape[1])
        for part in features.split(_ROWS):
            made.update(part)
        return made

    def update(self, features: Tensor) -> Moments:
        """Takes in the rows of `features` [n, d]; n rows and one matrix are held besides."""
        if not len(features):
            return self
        x = features.detach().cpu().double()
        mean = x.mean(0)
        self.scatter.addmm_((x - mean).T, x - mean)
        return self._join(len(x), mean)

    def merge(self, other: Moments) -> Moments:
        """Takes in what `other` has seen; returns self."""
        if not other.count:
            return self
        self.scatter += other.scatter
        return self._join(other.count, other.mean)

    def _join(self, n: int, mean: Tensor) -> Moments:
        """The part of the update that the gap between the two means makes."""
        count, gap = self.count + n, mean - self.mean
        self.mean = self.mean + gap * (n / count)
        self.scatter.addr_(gap, gap, alpha=self.count * n / count)
        self.count = count
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [d, d]: the scatter over n - 1. UserError below two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, not {self.count}: raise n")
        return self.scatter / (self.count - 1)


class Gaussian(Protocol):
    """Anything with a mean [d] and a covariance [d, d] in float64: `Moments`, or `statistics.Statistics`."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def covariance(self) -> Tensor: ...


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance of the two Gaussians; symmetric, 0 for equal moments, never negative. UserError if d differs."""
    if len(a.mean) != len(b.mean):
        raise UserError(
            f"features of {len(a.mean)} and {len(b.mean)} numbers have no distance: use one feature network"
        )
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(m1: Tensor, s1: Tensor, m2: Tensor, s2: Tensor) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 sum sqrt eig(S1^(1/2) S2 S1^(1/2)), for means [d] and covariances [d, d].

    S1 S2 has the eigenvalues of that symmetric matrix, which stay real; rounding below 0 is clamped.
    """
    root = _square_root(s1)
    inner = root @ s2 @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _square_root(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((s + s.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
