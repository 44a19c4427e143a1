"""Consistency models: distilled from a teacher or trained on data alone (Song et al., arXiv 2303.01469; Song and
Dhariwal, arXiv 2310.14189).

    L = weight * d( f_theta(x_t, t), sg f_-(x_s, s) ),   s the level below t on a grid that is even in sigma^(1/7)

    distill    x_s is a Heun step of the teacher from x_t; f_- is the averaged student; weight 1
    train      x_s = (1 - s) x0 + s eps with the data and noise of x_t; f_- is the averaged student; weight 1
    improved   as train, with f_- the student itself, weight 1 / (sigma_t - sigma_s), levels drawn by a log-normal law
               of sigma, and a grid that doubles from 10 to 1280 levels while training

with sigma = t / (1 - t) and f(x, t) = x - t v, which is x at t = 0 without further scaling. One student serves all
`steps`: the grid holds every level that its sampler visits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...data.batch import Cond
from ...maths.consistency import doubled, karras_times, lognormal_shares
from ...maths.guidance import guided
from ...maths.losses import mse_rows, pseudo_huber_norm_rows
from ...maths.paths import add_noise
from ...maths.solvers import Kind, Schedule, heun_step
from ...roles import Role
from ..base import Paper, Total, Update
from .trajectory import Interval, TrajectoryConfig, TrajectoryMethod

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw

AVERAGED = {"ema": 0.9999, "optimizer": {"lr": 1e-4}}


class ConsistencyConfig(TrajectoryConfig):
    """Knobs of `Consistency`. Guidance is the teacher's, so it goes with `mode: distill` alone."""

    mode: Literal["distill", "train", "improved"] = "distill"
    levels: int | None = Field(default=None, ge=2, description="of the grid; null: 18, in improved mode 10 at first")
    skip: None = Field(default=None, description="no choice here: the target is at the level below")
    guidance_scale: float | tuple[float, float] = Field(default=1.0, description="of the teacher; 1 = off")
    huber_c: float = Field(default=0.00054, gt=0, description="times the root of the elements of a sample")
    sigma_min: float = Field(default=0.002, gt=0, description="lowest level of the grid, in t / (1 - t)")
    sigma_max: float = Field(default=80.0, gt=0, description="where the highest level, which is noise, is counted")
    rho: float = Field(default=7.0, gt=0, description="levels are even in sigma^(1/rho)")
    levels_end: int = Field(default=1280, ge=2, description="improved: where the doubling of the grid stops")
    double_every: int = Field(default=50_000, gt=0, description="improved: steps between doublings; an eighth of a run")
    log_mean: float = Field(default=-1.1, description="improved: of the law of log sigma")
    log_std: float = Field(default=2.0, gt=0, description="improved: of the law of log sigma")

    @model_validator(mode="after")
    def _fits_mode(self) -> ConsistencyConfig:
        if self.mode != "distill" and self.guidance_scale != 1:
            raise ValueError(f"guidance_scale={self.guidance_scale} needs a teacher: write mode: distill, or remove it")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        return self


class Consistency(TrajectoryMethod):
    """Needs samples with conditions and a student; with `mode: distill` a teacher that the student starts as."""

    name = "consistency"
    paper = Paper("Consistency Models", "arXiv:2303.01469")
    proven = "measured"
    Config = ConsistencyConfig

    def roles(self) -> tuple[Role, ...]:
        """Teacher and averaged student; without a teacher the recipe says where the student comes from."""
        if self.config.mode == "distill":
            return (Role("teacher"), self.student_role())
        return (Role("student", "full", defaults=AVERAGED),)

    def student_role(self, name: str = "student") -> Role:
        """The base's role with the slower average of consistency models."""
        adds = ("guidance",) if self.config.embedded else ()
        return Role(name, "full", "teacher", defaults=AVERAGED, adds=adds)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One comparison of neighbours on the grid."""
        guidance, (at, weight) = self.guidance(draw), self.pair(draw)
        c, eps = self.told(batch.cond, guidance), draw.normal("eps", *batch.x0.shape[1:])
        x = add_noise(batch.x0, eps, self.time(at.u))
        if self.config.mode == "distill":
            below = self.walked(x, at, batch.cond, guidance, draw)
        else:
            below = add_noise(batch.x0, eps, self.time(at.u_next))
        target = self.target(below, at.u_next, c)
        prediction = self.f(self.student, x, at.u, c)
        x0_std = prediction.detach().flatten(1).std(1, correction=0)
        rows = weight * self.compare(prediction, target)
        yield Update("student", {"consistency": rows}, metrics={"x0_std": x0_std})

    # ---- the grid

    @property
    def levels(self) -> int:
        """Levels of the grid, in improved mode of the first one."""
        return self.config.levels or (10 if self.config.mode == "improved" else 18)

    def levels_at(self, step: int) -> int:
        """Levels of the grid after `step` steps; a function of the step alone, so that a resumed run agrees."""
        if self.config.mode != "improved":
            return self.levels
        return doubled(step, self.levels, max(self.levels, self.config.levels_end), self.config.double_every)

    def grid(self) -> tuple[float, ...]:
        """The clock values of the first grid."""
        return tuple(self.ladder(self.levels)[0][:-1].tolist())

    def ladder(self, count: int) -> tuple[Tensor, Tensor]:
        """Clock values and sigmas [n + 1] of a grid of `count` Karras points, with the end; the sampled levels in it."""
        said = self.config
        sampled = [self.path.time(u) for steps in said.steps for u in self.path.grid(steps)]
        t, sigma = karras_times(self.path, count, sampled, said.sigma_min, said.sigma_max, said.rho)
        return self.path.clock(t), sigma

    def pair(self, draw: Draw) -> tuple[Interval, Tensor]:
        """Neighbours of the grid for each row, and the weight [rows] of their comparison."""
        u, sigma = (value.to(draw.device) for value in self.ladder(self.levels_at(draw.step)))
        if self.config.mode != "improved":
            i = draw.integers("level", len(u) - 1)
            return Interval(u[i], u[i + 1]), torch.ones_like(u[i], dtype=torch.float32)
        shares = lognormal_shares(sigma, self.config.log_mean, self.config.log_std).cumsum(0)
        i = torch.searchsorted(shares, draw.uniform("level").double()).clamp(max=len(u) - 2)
        return Interval(u[i], u[i + 1]), (1 / (sigma[i] - sigma[i + 1])).float()

    # ---- teacher and student

    @torch.no_grad()
    def walked(self, x: Tensor, at: Interval, cond: Cond, guidance: Tensor | float, draw: Draw) -> Tensor:
        """One Heun step of the guided teacher on flow states; the last one, to t = 0, is an Euler step."""
        t, t_next = (self.path.time(u.double()) for u in at)

        def velocity(y: Tensor, s: Tensor | float) -> Tensor:
            return guided(self.teacher, y, torch.as_tensor(s).float(), cond, guidance)

        return heun_step(velocity, x, t, t_next)

    @torch.no_grad()
    def target(self, x: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """f of the averaged student, in improved mode of the student itself."""
        if self.config.mode != "improved":
            return super().target(x, u, cond)
        return self.f(self.student, x, u, cond)

    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The distance [rows]: mean squares, or the pseudo-Huber norm of a row with c = huber_c sqrt(elements)."""
        if self.config.distance == "l2":
            return mse_rows(prediction, target)
        return pseudo_huber_norm_rows(prediction, target, self.config.huber_c * prediction[0].numel() ** 0.5)

    # ---- sampling

    def schedule_for(self, steps: int, kind: Kind) -> Schedule:
        """The plain grid of `steps` levels, each of which is a level of the training grid."""
        return Schedule(kind, self.path.grid(steps), guidance=self.fed_guidance(), embedded=self.config.embedded)
