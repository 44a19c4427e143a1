"""RCGM: a network of average velocities is held against its own roll-out, without a derivative (arXiv 2512.05150, sec. 2).

One step of length D along v, then N steps of the averaged network V^-, from t - D down to s:

    y_0 = x_t - D v,   y_{i+1} = y_i - (s_i - s_{i+1}) V^-(y_i, s_i, s_{i+1}),   I = sum_i (s_i - s_{i+1}) V^-(y_i, s_i, s_{i+1})
    residual = ((t - s) V(x_t, t, s) - I) / D - v     where t - s >= D,     V - v elsewhere

which is MeanFlow's d/dt [(t - s) V] - v with a backward difference along v. Times are [rows], states [rows, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .losses import mse_rows
from .paths import expand

Metric = Literal["l2", "barron"]
Guide = Literal["self", "base", "base_datafree"]
Part = Literal["e2e", "mul", "any", "one", "adv"]
SECOND: Mapping[Part, tuple[float, float]] = {  # s / t is uniform between these
    "e2e": (0.0, 0.0),
    "mul": (0.95, 1.0),
    "any": (0.0, 1.0),
    "one": (0.0, 0.0),
    "adv": (1.0, 1.0),
}
Average = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, s) -> V(x, t, s)
BARRON_C = 1e-3


class Dealt(NamedTuple):
    """A batch's rows, kind after kind: `order` [rows] brings them so, and each part is then a slice.

    whole: e2e, the whole way from noise. near: mul, nearly s = t. between: mul, any and one. path: all that RCGM trains.
    twin: adv, TwinFlow's rows at negative time.
    """

    order: Tensor
    whole: slice
    near: slice
    between: slice
    path: slice
    twin: slice


def dealt(group: Sequence[Part], rows: int, device: torch.device) -> Dealt:
    """Rows by their place in groups of this composition: the same ones however a batch is cut between groups."""
    groups = rows // len(group)
    order = torch.arange(rows, device=device).view(groups, len(group)).T.flatten()
    whole, twin = groups * group.count("e2e"), rows - groups * group.count("adv")
    near = slice(whole, whole + groups * group.count("mul"))
    return Dealt(order, slice(0, whole), near, slice(whole, twin), slice(0, twin), slice(twin, rows))


def second_time(group: Sequence[Part], t: Tensor, u: Tensor) -> Tensor:
    """s <= t [rows] of rows in the order of `Dealt`, from u [rows] uniform in (0, 1)."""
    share = [low + (high - low) * part for (low, high), part in zip((SECOND[p] for p in group), u.chunk(len(group)))]
    return torch.minimum(t * torch.cat(share), t)


def split(top: Tensor, s: Tensor, order: int, fractions: Sequence[Tensor] | None = None) -> list[Tensor]:
    """`order` + 1 levels from `top` down to s: evenly spaced, or each at a drawn fraction of what is left.

    fractions: `order` - 1 of [rows] in (0, 1).
    """
    if fractions is None:
        return [torch.lerp(top, s, i / order) for i in range(order + 1)]
    levels = [top]
    for fraction in fractions:
        levels.append(torch.lerp(s, levels[-1], fraction))
    return [*levels, s]


def roll_out(average: Average, y: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """I, the way from y at the first level to the last one, by one call of `average` a segment."""
    way = torch.zeros_like(y)
    for a, b in pairwise(levels):
        part = expand(a - b, y) * average(y - way, a, b)
        way = way + part
    return way


def residual(answer: Tensor, way: Tensor, v: Tensor, t: Tensor, s: Tensor, step: float) -> Tensor:
    """What V(x_t, t, s) = `answer` is moved against, given I = `way` from t - `step` on; V - v where t - s < `step`."""
    gap = expand(t - s, answer)
    return torch.where(gap >= step, (gap * answer - way) / step - v, answer - v)


def limited(x: Tensor, limit: float | None) -> Tensor:
    """x with its elements clamped to -limit .. limit; None: x itself.

    The clamp makes the loss Huber's: where noise exceeds the limit, what is learned moves from the mean to the median.
    """
    return x if limit is None else x.clamp(-limit, limit)


def gap_weight(t: Tensor, s: Tensor) -> Tensor:
    """1 + tan(.4 pi (1 - (t - s))), [rows]: 1 at the whole way, 1.73 at half of it, 4.08 at s = t."""
    return 1 + torch.tan(0.4 * math.pi * (1 - (t - s)))


def metric_rows(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """Mean squared error a row; "barron" divides it by sg[sqrt(mse + c^2)], c = .001: a gradient of unit length."""
    mse = mse_rows(a, b)
    return mse if metric == "l2" else mse * (mse.detach() + BARRON_C**2) ** -0.5


def _self(v: Tensor, tied: Tensor, free: Tensor, scale: Tensor) -> Tensor:
    return v + (1 - 1 / scale) * (tied - free)


def _base(v: Tensor, tied: Tensor, free: Tensor, scale: Tensor) -> Tensor:
    return v + (scale - 1) * (tied - free)


def _base_alone(_v: Tensor, tied: Tensor, free: Tensor, scale: Tensor) -> Tensor:
    return torch.lerp(free, tied, scale)


ENHANCED: Mapping[Guide, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "self": _self,
    "base": _base,
    "base_datafree": _base_alone,
}


def enhanced(v: Tensor, tied: Tensor, free: Tensor, scale: Tensor, guide: Guide) -> Tensor:
    """The velocity v of the path, changed so that what is learned is free + scale (tied - free); scale [rows], 1 = off.

    tied, free: conditional and unconditional velocity at the same place, of the network that learns ("self": it comes
    to d = (1 - 1/scale) d + d_v, hence the factor) or of a frozen one ("base"); "base_datafree" takes nothing from v.
    """
    return ENHANCED[guide](v, tied, free, expand(scale, v))
