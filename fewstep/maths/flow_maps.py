"""Sampling with a one-step flow map and its teacher together, and the search for good noise.

A map answers V(z, delta), the mean velocity from the start of a path down to t_max - delta: f(z, delta) = z - delta V. It
reads the start state alone, so it cannot be composed with itself; further steps are the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .guidance import Denoises, guided
from .paths import add_noise, expand
from .solvers import heun_step

Solver = Literal["euler", "heun"]


def flow_map(student: Denoises, start: Tensor, delta: Tensor, cond: Any, t: float | None = None) -> Tensor:
    """f(z, delta) = z - delta V(z, delta), the student's state at t - delta; one network call.

    start: state [rows, ...] at time t (default: path.start(z) at t_max); delta [rows] in 0 .. t, which the network
    reads as `cond.delta`.
    """
    return start - expand(delta, start) * map_velocity(student, start, delta, cond, t)


def map_velocity(student: Denoises, start: Tensor, delta: Tensor, cond: Any, t: float | None = None) -> Tensor:
    """V(z, delta) [rows, ...]: the student at t (default: t_max), told delta."""
    t = student.path.t_max if t is None else t
    return student.velocity(start, delta.new_full((len(start),), t), cond.with_(delta=delta))


@torch.no_grad()
def teacher_walk(
    teacher: Denoises,
    x: Tensor,
    t: float,
    cond: Any,
    steps: int,
    scale: Tensor | float = 1.0,
    interval: tuple[float, float] | None = None,
    solver: Solver = "euler",
) -> Tensor:
    """Clean samples from states x [rows, ...] at time t, in `steps` equal steps of the guided teacher.

    Network evaluations a sample: steps (euler) or 2 steps - 1 (heun), twice that with guidance.
    """

    def velocity(state: Tensor, level: Tensor | float) -> Tensor:
        times = level if isinstance(level, Tensor) else state.new_full((len(state),), level)
        return guided(teacher, state, times, cond, scale, interval)

    for i in range(steps):
        now, later = t * (1 - i / steps), t * (1 - (i + 1) / steps)
        x = heun_step(velocity, x, now, later) if solver == "heun" else x + (later - now) * velocity(x, now)
    return x


@torch.no_grad()
def finish(
    student: Denoises, teacher: Denoises, start: Tensor, cond: Any, delta: float, steps: int, **teacher_options: Any
) -> Tensor:
    """The map covers the noisy part, the teacher the rest: f(z, delta), then `steps` steps from t_max - delta to 0.

    delta: .5 to .8 is usual. 1 + teacher evaluations a sample; options as for `teacher_walk`, whose `cond` is the same.
    """
    x = flow_map(student, start, start.new_full((len(start),), delta), cond)
    return teacher_walk(teacher, x, student.path.t_max - delta, cond, steps, **teacher_options)


@torch.no_grad()
def renoise(
    student: Denoises,
    teacher: Denoises,
    start: Tensor,
    noise: Tensor,
    cond: Any,
    t: float,
    steps: int,
    **teacher_options: Any,
) -> Tensor:
    """The map's sample is noised to t and cleaned by the teacher: (1 - t) f(z, t_max) + t n, then `steps` steps.

    t: .2 to .5 is usual. noise: n, like `start`.
    """
    x0 = flow_map(student, start, start.new_full((len(start),), student.path.t_max), cond)
    return teacher_walk(teacher, add_noise(x0, noise, t), t, cond, steps, **teacher_options)


@torch.no_grad()
def best_noise(student: Denoises, starts: Tensor, cond: Any, score: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Of N start states [N, rows, ...] a row the one whose sample scores highest: [rows, ...]. N evaluations a sample.

    score(x0 [rows, ...], cond) -> [rows]. What wins is given to the teacher, which walks it from t_max: the map stands
    for the teacher where candidates are many (arXiv 2511.19428).
    """
    delta = starts.new_full((starts.shape[1],), student.path.t_max)
    scores = torch.stack([score(flow_map(student, start, delta, cond), cond) for start in starts])
    return starts[scores.argmax(0), torch.arange(starts.shape[1], device=starts.device)]
