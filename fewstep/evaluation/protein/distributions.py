"""How far apart two sets of numbers are: Wasserstein-1 of single features, energy distance of feature vectors."""

from __future__ import annotations

import numpy as np

from .geometry import Coords

_ROWS = 256  # of a matrix of distances that are held at once


def wasserstein(a: Coords, b: Coords) -> float:
    """Wasserstein-1 distance of two samples of numbers: the area between their quantile functions; without NaN."""
    a, b = np.sort(a[np.isfinite(a)]), np.sort(b[np.isfinite(b)])
    if not len(a) or not len(b):
        return float("nan")
    levels = np.sort(np.concatenate([np.arange(1, len(a)) / len(a), np.arange(1, len(b)) / len(b), [0.0, 1.0]]))
    middle, width = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    return float((np.abs(_quantile(a, middle) - _quantile(b, middle)) * width).sum())


def energy_distance(a: Coords, b: Coords) -> float:
    """sqrt(2 E|x - y| - E|x - x'| - E|y - y'|) of vectors x from a [n, features] and y from b [m, features].

    Zero only for equal distributions (Szekely & Rizzo, 2013). In one dimension it is sqrt(2) times the L2 distance of the
    distribution functions. Rows with NaN are left out; NaN when nothing is left.
    """
    a, b = (x[np.isfinite(x).all(1)] for x in (a, b))
    if not len(a) or not len(b):
        return float("nan")
    return float(np.sqrt(max(0.0, 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b))))


def _mean_distance(a: Coords, b: Coords) -> float:
    parts = [a[i : i + _ROWS] for i in range(0, len(a), _ROWS)]
    return float(sum(np.linalg.norm(part[:, None] - b[None], axis=2).sum() for part in parts) / (len(a) * len(b)))


def _quantile(ordered: Coords, level: Coords) -> Coords:
    return ordered[np.minimum((level * len(ordered)).astype(int), len(ordered) - 1)]
