"""Chains of known shape, CA atoms in Angstrom."""

from __future__ import annotations

import numpy as np


def coil(n: int, radius: float, rise: float, turn: float) -> np.ndarray:
    """A regular helix: radius and rise a residue in Angstrom, turn in degrees."""
    angle = np.radians(turn) * np.arange(n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), rise * np.arange(n)], 1)


def helix(n: int = 30) -> np.ndarray:
    """An ideal right-handed alpha helix."""
    return coil(n, 2.3, 1.5, 100.0)


def strand(n: int = 30) -> np.ndarray:
    """An ideal extended strand."""
    return coil(n, 0.95, 3.3, 195.0)


def mirrored(x: np.ndarray) -> np.ndarray:
    """The mirror image."""
    return x * np.array([1.0, 1.0, -1.0])


def turned(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """x under a random rotation and translation."""
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    q[:, 0] *= np.sign(np.linalg.det(q))
    return x @ q.T + 10 * rng.normal(size=3)
