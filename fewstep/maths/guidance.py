"""Classifier-free guidance; the scale is the usual one, 1 = off, 0 = unconditional (arXiv 2207.12598)."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .paths import Path, expand

Rescale = Literal["energy"]


class Denoises(Protocol):
    """What guidance and solvers ask of a network: see `models.denoiser.Denoiser`."""

    @property
    def path(self) -> Path:
        """The network's path."""

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """v at flow state x [rows, ...], t [rows]."""

    def x0(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Predicted clean sample."""

    def null(self, cond: Any) -> Any:
        """The unconditional condition with the rows of `cond`."""

    def told(self, cond: Any, scale: Tensor | float) -> Any:
        """`cond` with guidance as an input, where the network was trained with it."""


def cfg(uncond: Tensor, cond: Tensor, scale: Tensor | float) -> Tensor:
    """uncond + scale (cond - uncond), bit-exact at scale 0 and 1; scale is a number or [rows]."""
    weight = expand(scale, cond).to(cond) if isinstance(scale, Tensor) else scale
    return torch.lerp(uncond, cond, weight)


def guided(
    denoiser: Denoises,
    x: Tensor,
    t: Tensor,
    cond: Any,
    scale: Tensor | float,
    interval: tuple[float, float] | None = None,
    what: str = "velocity",
) -> Tensor:
    """The guided prediction `what` ("velocity", "x0", "eps") from one call on conditional and null rows together.

    x [rows, ...], t [rows]; scale a number or [rows]. interval = (low, high): rows whose t lies outside are not guided
    (Kynkäänniemi et al., arXiv 2404.07724). A plain number 1 makes a single unguided call, and so does a base that is
    told its guidance (FLUX.1 dev), whatever the scale.
    """
    predict = getattr(denoiser, what)
    if isinstance(scale, float | int) and scale == 1:
        return predict(x, t, cond)
    if interval is not None:
        inside = (t >= interval[0]) & (t <= interval[1])
        scale = torch.where(inside, torch.as_tensor(scale, dtype=t.dtype, device=t.device), torch.ones_like(t))
    if is_told(denoiser):
        return predict(x, t, denoiser.told(cond, scale))
    both = type(cond).cat([cond, denoiser.null(cond)])
    conditional, unconditional = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return cfg(unconditional, conditional, scale)


def is_told(denoiser: Denoises) -> bool:
    """Whether one call with `cond.guidance` [rows] is the guided prediction already: see `Denoiser.embeds_guidance`."""
    return getattr(denoiser, "embeds_guidance", False)


def guided_x0(
    denoiser: Denoises,
    x: Tensor,
    t: Tensor,
    cond: Any,
    scale: Tensor | float,
    interval: tuple[float, float] | None = None,
    rescale: Rescale | None = None,
) -> Tensor:
    """`guided` for the clean sample; the same as x - t times the guided velocity, since guidance is linear.

    rescale "energy": what is guided gets the norm of the conditional prediction, row by row, so that large scales do not
    raise contrast.
    """
    if rescale is None or is_told(denoiser) or (isinstance(scale, float | int) and scale == 1):
        return guided(denoiser, x, t, cond, scale, interval, what="x0")
    both = type(cond).cat([cond, denoiser.null(cond)])
    tied, free = denoiser.x0(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return same_norm(cfg(free, tied, scale), tied)


def same_norm(x: Tensor, like: Tensor) -> Tensor:
    """x |like| / |x| with norms over whole rows, float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norms = [v.to(wide).flatten(1).norm(dim=1) for v in (like, x)]
    return x * expand(norms[0] / norms[1].clamp_min(1e-6), x)
