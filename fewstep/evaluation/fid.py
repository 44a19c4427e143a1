"""Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500).

    FID = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

The value is biased upwards by about (1/n1 + 1/n2) (d + d (d + 1) / 4) for features that are N(0, I_d), so scores with
different set sizes are never compared. Everything is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError


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
        """Moments of one set [n, d]."""
        made = cls(features.shape[1])
        x = features.detach().cpu().double()
        if len(x):
            made.count, made.mean = len(x), x.mean(0)
            centred = x - made.mean
            made.scatter = centred.T @ centred
        return made

    def update(self, features: Tensor) -> Moments:
        """Takes in the rows of `features` [n, d]."""
        return self.merge(Moments.of(features))

    def merge(self, other: Moments) -> Moments:
        """Takes in what `other` has seen; returns self."""
        count = self.count + other.count
        if other.count:
            gap = other.mean - self.mean
            self.mean = self.mean + gap * (other.count / count)
            self.scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (self.count * other.count / count)
        self.count = count
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [d, d]: the scatter over n - 1. UserError below two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, not {self.count}: raise n")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet distance of the two Gaussians; symmetric, 0 for equal moments, never negative."""
    s1, s2 = a.covariance, b.covariance
    return gaussian_distance(a.mean, s1, b.mean, s2)


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
