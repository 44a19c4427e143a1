"""Stepping a denoiser from noise to data: few-step schedules, rollouts, and the solvers that teachers use.

States are flow states x_t = (1 - t) x0 + t eps on every path, so one formula serves flow and VP networks alike (DDIM is
Euler here). Schedules are written on the path's clock. Coefficients are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .guidance import Denoises, Rescale, guided_x0
from .paths import expand
from .sde import ddim_eta_step, er_sde_step, euler_maruyama_step, langevin_step, sde_dpm_2_step

__all__ = [
    "Draws",
    "Schedule",
    "ddim_eta_step",
    "er_sde_step",
    "euler_maruyama_step",
    "heun_step",
    "langevin_step",
    "rollout",
    "sample",
    "sde_dpm_2_step",
    "step",
]

Kind = Literal["ode", "renoise", "sde"]
Target = Literal["next", "zero", "same"]
KINDS = ("ode", "renoise", "sde")
NOISES = ("fresh", "start")
TARGETS = (None, "next", "zero", "same")
RESCALES = (None, "energy")


class Draws(Protocol):
    """Addressed randomness: the same name gives the same numbers."""

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal [rows, *shape]."""


@dataclass(frozen=True)
class Schedule:
    """How a few-step model is sampled.

    kind: "ode" moves along the velocity; "renoise" goes to x0 and noises it to the next level; "sde" is
        `sde.langevin_step`, velocity and score together.
    u: clock values at which the network is called, decreasing within (0, 1]; after the last comes the clean sample.
    guidance: the usual scale, 1 = off. embedded: it is an input of the network, so a sample costs no second pass.
    noise: what "renoise" adds, "fresh" noise at every level or the "start" noise.
    origin: u was picked from a grid of so many levels (LCM's 50); None: u is the whole grid.
    target: the second time s that a two-time network is told at t: the "next" level, "zero", or the "same" t; None for
        networks with one time.
    last: of "next": what the last step, which ends at 0, is told, as a share of its t.
    rescale: "energy" gives the guided x0 the norm of the conditional one.
    noise_scale: factor of all noise, the start too, of "renoise" (a standard deviation); of the noise's variance of "sde".
    renewal: of "sde": the largest share of the noise that a step may replace; None: no limit.
    Raises UserError when a value is out of range or u does not decrease.
    """

    kind: Kind
    u: tuple[float, ...]
    guidance: float = 1.0
    noise: str = "fresh"
    embedded: bool = False
    origin: int | None = None
    target: Target | None = None
    last: float = 0.0
    rescale: Rescale | None = None
    noise_scale: float = 1.0
    renewal: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "u", tuple(float(level) for level in self.u))
        if self.kind not in KINDS or self.noise not in NOISES:
            raise UserError(f"sampler {self.kind!r} with noise {self.noise!r}: allowed are {KINDS} with {NOISES}")
        if self.target not in TARGETS or self.rescale not in RESCALES or not 0 <= self.last <= 1:
            raise UserError(
                f"target {self.target!r}, rescale {self.rescale!r}, last {self.last}: allowed are {TARGETS}, {RESCALES}, "
                "and 0 to 1"
            )
        if not self.u or min(self.u) <= 0 or max(self.u) > 1:
            raise UserError(f"schedule levels {self.u} must be one or more numbers above 0 and at most 1")
        if any(later >= earlier for earlier, later in zip(self.u, self.u[1:])):
            raise UserError(
                f"schedule levels {self.u} must decrease: level 1 is noise, the last one is nearest to data"
            )

    @classmethod
    def uniform(cls, steps: int, kind: Kind = "ode", guidance: float = 1.0, start: float = 1.0) -> Schedule:
        """u_i = start (1 - (i - 1) / steps), i = 1..steps."""
        if steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}")
        return cls(kind, tuple(start * (1 - i / steps) for i in range(steps)), guidance)

    @property
    def steps(self) -> int:
        """Number of network calls a sample."""
        return len(self.u)

    def told(self, t: float, t_next: float) -> float | None:
        """The second time of the call at t, in a step to t_next (0: the last one); None where there is none."""
        if self.target is None:
            return None
        if self.target == "next":
            return t_next if t_next > 0 else self.last * t
        return t if self.target == "same" else 0.0


def step(
    kind: Kind,
    x: Tensor,
    x0: Tensor,
    t: Tensor | float,
    t_next: Tensor | float,
    noise: Tensor | None = None,
    noise_scale: float = 1.0,
    renewal: float | None = None,
) -> Tensor:
    """One step from t to t_next < t, given the prediction x0 at x; exactly x0 when t_next = 0.

    ode: x + (t_next - t) v with v = (x - x0) / t. renoise: (1 - t_next) x0 + noise_scale t_next noise. sde: see
    `sde.langevin_step`.
    """
    if kind == "ode":
        return x0 + expand(_wide(t_next) / _wide(t), x) * (x - x0)
    if isinstance(t_next, float | int) and t_next == 0:
        return x0
    if noise is None:
        raise ValueError(f"a {kind} step to t_next > 0 needs noise")
    if kind == "sde":
        return langevin_step(x, x0, t, t_next, noise, noise_scale, renewal)
    t_next = expand(t_next, x)
    return (1 - t_next) * x0 + noise_scale * t_next * noise


@torch.no_grad()
def rollout(
    denoiser: Denoises, schedule: Schedule, cond: Any, draw: Draws, shape: tuple[int, ...], until: int | None = None
) -> tuple[Tensor, float]:
    """The state that enters level `until` (counted from 0) and its clock value; no graph is kept.

    shape: of one row. until = 0 is the start noise itself; until = None or `schedule.steps` the finished sample at
    u = 0. Noise is drawn as "rollout.start" and, for "renoise", as "rollout.j" after level j.
    """
    levels = (*schedule.u, 0.0)
    until = schedule.steps if until is None else until
    if not 0 <= until <= schedule.steps:
        raise ValueError(f"level {until} of a schedule with {schedule.steps}")
    start = draw.normal("rollout.start", *shape)
    x = denoiser.path.start(start)
    x = schedule.noise_scale * x if schedule.kind == "renoise" else x
    cond, scale = conditions(schedule, cond, x)
    for j in range(until):
        t = denoiser.path.time(levels[j])
        t_next = denoiser.path.time(levels[j + 1]) if levels[j + 1] > 0 else 0.0
        s = schedule.told(t, t_next)
        said = cond if s is None else cond.with_(s=x.new_full((len(x),), s))
        x0 = guided_x0(denoiser, x, x.new_full((len(x),), t), said, scale, rescale=schedule.rescale)
        noise = _renoise(schedule, t_next, start, draw, j)
        x = step(schedule.kind, x, x0, t, t_next, noise, schedule.noise_scale, schedule.renewal)
    return x, levels[until]


def conditions(schedule: Schedule, cond: Any, x: Tensor) -> tuple[Any, float]:
    """What the network is called with to sample `schedule`: its condition, and the scale of classifier-free guidance."""
    if not schedule.embedded:
        return cond, schedule.guidance
    return cond.with_(guidance=x.new_full((len(x),), schedule.guidance)), 1.0


def _renoise(schedule: Schedule, t_next: float, start: Tensor, draw: Draws, j: int) -> Tensor | None:
    if schedule.kind == "ode" or t_next == 0:
        return None
    return start if schedule.noise == "start" else draw.normal(f"rollout.{j}", *start.shape[1:])


def sample(denoiser: Denoises, schedule: Schedule, cond: Any, draw: Draws, shape: tuple[int, ...]) -> Tensor:
    """Finished samples [rows, *shape] as the exported scheduler makes them: the whole of `rollout`."""
    return rollout(denoiser, schedule, cond, draw, shape)[0]


def heun_step(
    velocity: Callable[[Tensor, Tensor | float], Tensor], x: Tensor, t: Tensor | float, t_next: Tensor | float
) -> Tensor:
    """Second-order step x + (t_next - t) (v(x, t) + v(x', t_next)) / 2 with x' the Euler step (EDM, algorithm 1).

    Two calls of `velocity`; a step to t_next = 0 stays Euler, since networks are not defined there. Times are numbers
    or [rows]; when t_next is a tensor the second call is made for all rows, with t itself for those that end at 0.
    """
    width = expand(t_next - t, x)
    first = velocity(x, t)
    euler = x + width * first
    if not isinstance(t_next, Tensor):
        if t_next == 0:
            return euler
        second = velocity(euler, torch.full_like(t, t_next) if isinstance(t, Tensor) else t_next)
        return x + width * (first + second) / 2
    ends = t_next == 0
    second = velocity(euler, torch.where(ends, t, t_next))
    return torch.where(expand(ends, x) > 0, euler, x + width * (first + second) / 2)


def _wide(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)
