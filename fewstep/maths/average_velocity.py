"""Average velocities: what a two-time network answers, and the states it leads to.

    V(x_t, t, s) = (x_t - x_s) / (t - s),   V(x, t, t) = v,   x_s = x_t - (t - s) V(x_t, t, s)

A network reads s as `cond.s`, and with sign = -1 as `cond.sign` a second field at the same |t| (TwinFlow).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .guidance import Denoises
from .paths import expand


def average_velocity(
    network: Denoises, x: Tensor, t: Tensor, s: Tensor, cond: Any, sign: Tensor | None = None
) -> Tensor:
    """V(x, t, s) [rows, ...], the mean velocity from t down to s <= t, both [rows]; one network call.

    sign: +1 or -1 [rows]; None: +1.
    """
    told = cond.with_(s=s) if sign is None else cond.with_(s=s, sign=sign)
    return network.velocity(x, t, told)


def jump(network: Denoises, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
    """The state at s: x - (t - s) V(x, t, s)."""
    return x - expand(t - s, x) * average_velocity(network, x, t, s, cond)


def landing(network: Denoises, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
    """The clean sample that a call at t told s stands for: x - t V(x, t, s)."""
    return x - expand(t, x) * average_velocity(network, x, t, s, cond)
