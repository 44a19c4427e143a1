"""Replayable noise: random numbers that are a function of (seed, stream, sample, element) and of nothing else."""

from __future__ import annotations

from .reference import FORMAT, normal, philox, uniform, words

__all__ = ["FORMAT", "normal", "philox", "uniform", "words"]
