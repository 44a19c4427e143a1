"""Average velocities: what a two-time network answers, the states it leads to, and what it is trained on.

    V(x_t, t, s) = (x_t - x_s) / (t - s),   V(x, t, t) = v,   x_s = x_t - (t - s) V(x_t, t, s)

A network reads s as `cond.s`, and with sign = -1 as `cond.sign` a second field at the same |t| (TwinFlow).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .derivative import How, derivative
from .guidance import Denoises, cfg
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


def composed(
    network: Denoises, x: Tensor, t: Tensor, middle: Tensor, s: Tensor, cond: Any, instant: Tensor | None = None
) -> Tensor:
    """V(x, t, s) as two calls make it, [(t - m) V(x, t, m) + (m - s) V(x_m, m, s)] / (t - s) by way of m = `middle`.

    With m half-way it is the mean of both (shortcut models, arXiv 2410.12557, eq. 4). Times [rows], t > m > s.
    instant: rows [rows] whose two calls are told their own time, so that they are Euler steps.
    """
    told = [middle, s] if instant is None else [torch.where(instant, t, middle), torch.where(instant, middle, s)]
    first = average_velocity(network, x, t, told[0], cond)
    x = x - expand(t - middle, x) * first
    second = average_velocity(network, x, middle, told[1], cond)
    return torch.lerp(second, first, expand((t - middle) / (t - s), x))


def slope_along(
    network: Denoises, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Any, how: How = "jvp", h: float = 5e-3
) -> Tensor:
    """dV/dt = v . grad_x V + d_t V [rows, ...] at (x, t) with s held, without a graph (MeanFlow, arXiv 2505.13447, eq. 8).

    The derivative of V(x + (t' - t) v, t', s) in t' alone: one tangent pass, or differences (`maths.derivative`).
    """

    def moved(at: Tensor) -> Tensor:
        return average_velocity(network, x + expand(at - t, x) * v, at, s, cond)

    return derivative(moved, t, how, h, high=network.path.t_max)[1]


@torch.no_grad()
def guided_velocity(
    network: Denoises, x: Tensor, v: Tensor, t: Tensor, cond: Any, scale: float, mix: float = 0.0
) -> Tensor:
    """(1 - k) [w v + (1 - w) V(x, t, t, null)] + k V(x, t, t, cond): a sample v of the velocity, guided by the network.

    A network that learns it answers v_g = w E[v | x, cond] + (1 - w) E[v | x] at s = t for every mixing k = `mix` in
    [0, 1): v_g = (1 - k) v_g + k v_g. The larger k, the less noise of v is in it (MeanFlow, arXiv 2505.13447, appendix,
    which writes omega = (1 - k) w). scale: w, the usual one, 1 = off. One network call, of twice the rows when k > 0.
    """
    if mix == 0:
        return cfg(average_velocity(network, x, t, t, network.null(cond)), v, scale)
    both = type(cond).cat([network.null(cond), cond])
    twice = torch.cat([t, t])
    free, tied = average_velocity(network, torch.cat([x, x]), twice, twice, both).chunk(2)
    return torch.lerp(cfg(free, v, scale), tied, mix)
