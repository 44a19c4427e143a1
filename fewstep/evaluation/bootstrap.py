"""How sure a mean over images is, and whether two models differ on the same prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES, LEVEL = 2000, 0.95
_DRAWN = 2**22  # indices held at once


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval, over n values."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class SignTest:
    """How often a difference was above, below and at 0, and the two-sided p of that under a fair coin."""

    wins: int
    losses: int
    ties: int
    p: float


def mean_interval(values: Tensor, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of values [n] and the quantiles (1 -+ level) / 2 of means over n values drawn with replacement.

    Of paired values, give the differences: pairs are then drawn together. Equal seeds give equal intervals.
    """
    x = values.double()
    generator, n = torch.Generator().manual_seed(seed), len(x)
    means: list[Tensor] = []
    for rows in torch.arange(resamples).split(max(1, _DRAWN // n)):
        means.append(x[torch.randint(n, (len(rows), n), generator=generator)].mean(1))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(ends).tolist()
    return Interval(x.mean().item(), low, high, n)


def sign_test(differences: Tensor) -> SignTest:
    """p = min(1, 2 P[Binomial(m, 1/2) <= min(wins, losses)]), with m = wins + losses; ties say nothing and are left out."""
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return SignTest(wins, losses, len(differences) - wins - losses, two_sided(min(wins, losses), wins + losses))


def two_sided(fewer: int, m: int) -> float:
    """2 P[Binomial(m, 1/2) <= fewer], at most 1; 1 for m = 0. Summed by logarithms, so that m may be tens of thousands."""
    logs = [
        math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1) - m * math.log(2) for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
