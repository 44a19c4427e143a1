"""Losses told apart by noise level: what each micro-batch adds up, what a line logs, and what a picture shows of it.

A row at flow time t in [0, 1] falls into bin k = floor(8 t), t = 1 into the last one. A log line holds
`level.NAME.k`, the mean of the rows that fell into bin k since the line before; a bin without rows is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Levels

BINS = 8
KEY = re.compile(r"level\.(.+)\.(\d)")
PARTS = 3  # of training, each a line in the picture
Points = list[tuple[float, float]]


def binned(levels: Levels) -> Tensor:
    """[2, 8] float32: the sum of the rows in each bin of t, and their number. Stays on the device, without a host sync."""
    rows = levels.rows.detach().float()
    bins = (levels.t.detach() * BINS).long().clamp(0, BINS - 1)
    inside = bins[:, None] == torch.arange(BINS, device=bins.device)
    sums = torch.where(inside, rows[:, None], torch.zeros_like(rows[:, None])).sum(0)
    return torch.stack([sums, inside.sum(0).float()])


def means(name: str, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """`level.NAME.k` of the bins that have rows."""
    return {f"level.{name}.{k}": sums[k] / counts[k] for k in range(BINS) if counts[k]}


def by_level(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """name -> part of training -> [(centre of the bin, mean)]: the lines that have the name, cut into early, middle, latest.

    A part averages its lines; infinite values and NaN are left out, and so are parts without a line.
    """
    found: dict[str, list[tuple[int, dict[int, float]]]] = {}
    for line in lines:
        for name, bins in _bins(line).items():
            found.setdefault(name, []).append((line["step"], bins))
    return {name: _parts(logged) for name, logged in found.items()}


def _bins(line: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    bins: dict[str, dict[int, float]] = {}
    for key, value in line.items():
        said = KEY.fullmatch(key)
        if said is not None and math.isfinite(value):
            bins.setdefault(said[1], {})[int(said[2])] = value
    return bins


def _parts(logged: Sequence[tuple[int, dict[int, float]]]) -> dict[str, Points]:
    ends = [len(logged) * i // PARTS for i in range(PARTS + 1)]
    parts = [logged[first:last] for first, last in pairwise(ends) if last > first]
    return {_span(part): _average([bins for _, bins in part]) for part in parts}


def _span(part: Sequence[tuple[int, Any]]) -> str:
    first, last = part[0][0], part[-1][0]
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _average(lines: Sequence[Mapping[int, float]]) -> Points:
    seen = {k: [bins[k] for bins in lines if k in bins] for k in range(BINS)}
    return [((k + 0.5) / BINS, sum(values) / len(values)) for k, values in seen.items() if values]
