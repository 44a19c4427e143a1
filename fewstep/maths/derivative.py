"""The derivative of a network in one scalar of its input, without a graph: a tangent pass, or differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from fewstep_kernels.attention import attending
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from .paths import expand

How = Literal["jvp", "central", "backward"]
Function = Callable[[Tensor], Tensor]


def derivative(f: Function, at: Tensor, how: How = "jvp", h: float = 5e-3, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """(f(s), df/ds) at s = `at` [rows], both [rows, ...] and without a graph; row i of f depends on s_i alone.

    jvp: exact, one forward-mode pass of tangent 1, about two forwards; attention runs by the back end of its processors, see
    `fewstep_kernels.attention`, or by the automatic one. central: (f(s+h) - f(s-h)) / 2h, three forwards,
    error O(h^2). backward: (f(s) - f(s-h)) / h, two forwards, error O(h), and 0 at s = 0. Points are clipped to [0, high]
    and the difference is divided by the gap that is left. In bfloat16 rounding is about .004 |f| / h, so h is then .05 or more.
    Raises UserError when the network has no forward mode for jvp.
    """
    with torch.no_grad():
        if how == "jvp":
            return _jvp(f, at)
        value = f(at)
        below = (at - h).clamp(min=0)
        above = (at + h).clamp(max=high) if how == "central" else at
        upper = f(above) if how == "central" else value
        gap = (above - below).clamp_min(torch.finfo(at.dtype).tiny)  # backward at s = 0 has no gap and answers 0
        return value, (upper - f(below)) / expand(gap, value)


def _jvp(f: Function, at: Tensor) -> tuple[Tensor, Tensor]:
    try:
        # torch's fused attention has no forward mode: ours does, in O(N) memory, and what it leaves to torch is its plain formula
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), attending("auto"):
            value, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(at, torch.ones_like(at))))
    except (RuntimeError, NotImplementedError) as error:
        if "forward AD" not in str(error) and "forward mode" not in str(error) and "jvp" not in str(error):
            raise
        raise UserError(
            f"no forward-mode derivative of this network ({str(error).splitlines()[0]}): write config.derivative: central"
        ) from error
    if tangent is None:
        raise UserError(
            "no forward-mode derivative of this network (an operation drops the tangent): write config.derivative: central"
        )
    return value, tangent
