"""Changes of variables at one noise level: x0, eps, velocity, score, and what networks predict in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


def expand(value: Tensor | float, like: Tensor) -> Tensor:
    """`value` [rows] or scalar with the trailing ones that let it multiply `like` [rows, ...].

    It takes the dtype of `like`, but never one below float32: a time rounded to bfloat16 would be off by 0.004.
    """
    value = torch.as_tensor(value, dtype=torch.promote_types(like.dtype, torch.float32))
    if value.ndim == 0:
        return value  # a number on the host multiplies tensors of any device without a copy
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """y_t = (1 - t) x0 + t eps."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * eps


def x0_from_velocity(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """x0 = x - t v."""
    return x - expand(t, x) * v


def eps_from_velocity(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """eps = x + (1 - t) v."""
    return x + (1 - expand(t, x)) * v


def score_from_velocity(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """grad log p_t(x) = -(x + (1 - t) v) / t; infinite at t = 0."""
    return -eps_from_velocity(x, v, t) / expand(t, x)


class Parameterisation(NamedTuple):
    """What a network predicts, as three formulas in flow variables; t is already expanded."""

    velocity: Callable[[Tensor, Tensor, Tensor], Tensor]  # (output, y, t) -> v
    output: Callable[[Tensor, Tensor, Tensor], Tensor]  # (v, y, t) -> output
    target: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x0, eps, t) -> output


def rotation(t: Tensor) -> Tensor:
    """1 / (alpha + sigma) = sqrt(t^2 + (1 - t)^2) on a path where alpha^2 + sigma^2 = 1."""
    return (t**2 + (1 - t) ** 2) ** 0.5


FLOW = Parameterisation(lambda o, _y, _t: o, lambda v, _y, _t: v, lambda x0, eps, _t: eps - x0)
EPSILON = Parameterisation(lambda o, y, t: (o - y) / (1 - t), lambda v, y, t: y + (1 - t) * v, lambda _x0, eps, _t: eps)
SAMPLE = Parameterisation(lambda o, y, t: (y - o) / t, lambda v, y, t: y - t * v, lambda x0, _eps, _t: x0)
ROTATED = Parameterisation(  # alpha eps - sigma x0 on a unit circle: "v_prediction", and TrigFlow's F
    lambda o, y, t: (rotation(t) * o - (1 - 2 * t) * y) / rotation(t) ** 2,
    lambda v, y, t: ((1 - 2 * t) * y + rotation(t) ** 2 * v) / rotation(t),
    lambda x0, eps, t: ((1 - t) * eps - t * x0) / rotation(t),
)
PREDICTIONS: Mapping[str, Parameterisation] = {"epsilon": EPSILON, "v_prediction": ROTATED, "sample": SAMPLE}
