"""TrigFlow for data of any scale, in flow variables (Lu and Song, arXiv 2410.11081).

The paper's process is x_a = cos(a) x0 + sin(a) s n with s the std of the data, a in [0, pi/2], and its network answers F
in x0 = cos(a) x_a - sin(a) s F(x_a / s, a). A flow state y = (1-t) x0 + t n holds the same numbers:

    tan a = t / ((1-t) s),   x_a = s y / A,   A(t) = sqrt((1-t)^2 s^2 + t^2),   cos a = (1-t) s / A,   sin a = t / A
    s F = (((1-t) s^2 - t) y) / A + A v,        F_1 - F_2 = A (v_1 - v_2) / s

A is the std of y, so that y / A has unit variance. `paths.TrigFlowPath` is the case s = 1 as a network's own process.
Times t are [rows] or one number; nothing here divides by t or by 1 - t.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .paths import expand
from .variables import Parameterisation

Shape = Literal["norm", "rms", "clip", "none"]


def angle(t: Tensor, data_std: float) -> Tensor:
    """a = arctan(t / ((1-t) s)), in radians; pi/2 at t = 1."""
    return torch.atan2(t, (1 - t) * data_std)


def flow_time(a: Tensor, data_std: float) -> Tensor:
    """t = s sin a / (cos a + s sin a), the inverse of `angle`."""
    across = data_std * a.sin()
    return across / (a.cos() + across)


def spread(t: Tensor, data_std: float) -> Tensor:
    """A(t) = sqrt((1-t)^2 s^2 + t^2), the std of the flow state; dt/da = A^2 / s."""
    return torch.hypot((1 - t) * data_std, t)


def trigflow(data_std: float) -> Parameterisation:
    """F against v: conversions between both, and the F that is right for a pair, cos(a) n - sin(a) x0 / s.

    The three functions take t expanded to the rows' shape, as all parameterisations do.
    """
    s = data_std

    def velocity(output: Tensor, y: Tensor, t: Tensor) -> Tensor:
        a = spread(t, s)
        return (s * output - ((1 - t) * s**2 - t) / a * y) / a

    def output(v: Tensor, y: Tensor, t: Tensor) -> Tensor:
        a = spread(t, s)
        return (((1 - t) * s**2 - t) / a * y + a * v) / s

    def target(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return ((1 - t) * s * eps - t / s * x0) / spread(t, s)

    return Parameterisation(velocity, output, target)


def consistency_tangent(gap: Tensor, slope: Tensor, t: Tensor, data_std: float, warm: float = 1.0) -> Tensor:
    """g = cos(a) df/da along the trajectory, the direction in which F should move (the paper's algorithm 1); [rows, ...].

        g = -cos^2(a) (s F - dx_a/da) - r cos(a) sin(a) (x_a + s dF/da)
          = cos^2(a) A u' + r t (1-t) [ (t - (1-t) s^2) / A u' - A dv/dt ],     u' = dy/dt - v

    gap: u', the trajectory's velocity less the network's. slope: dv/dt = (dy/dt) . grad_y v + d_t v, along the
    trajectory. warm: r; at r = 0 a step pulls v to dy/dt alone.

    The second line follows with dx_a/da = s F(dy/dt): the first bracket is A (v - dy/dt). At r = 1 the whole is
    cos(a) (dt/da) df/dt = (1-t) A (u' - t dv/dt), since f = y - t v; the rest of it, once the first term is taken off,
    is the second bracket. Zero at a = pi/2 in any case.
    """
    t = expand(t, gap)
    a = spread(t, data_std)
    near = ((1 - t) * data_std / a) ** 2 * a * gap
    return near + warm * t * (1 - t) * ((t - (1 - t) * data_std**2) / a * gap - a * slope)


def shaped(g: Tensor, shape: Shape, c: float = 0.1) -> Tensor:
    """The tangent as it enters the loss, against its heavy tails.

    norm: g / (|g| + c), |g| the norm of a whole row. rms: g / (rms(g) + c), the same whatever the number of elements.
    clip: every element clipped to [-1, 1]. none: g itself.
    """
    if shape == "none":
        return g
    if shape == "clip":
        return g.clamp(-1, 1)
    length = g.flatten(1).norm(dim=1)
    return g / (expand(length if shape == "norm" else length / g[0].numel() ** 0.5, g) + c)
