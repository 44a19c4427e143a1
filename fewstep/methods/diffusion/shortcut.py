"""Shortcut models (Frans et al., arXiv 2410.12557): one network that knows how far it steps, without a teacher.

    x_t = (1 - t) x0 + t eps,  v = eps - x0
    flow           V(x_t, t, t) = v                                                         three rows in four
    consistency    V(x_t, t, t - 2d) = sg[V(x_t, t, t - d) + V(x', t - d, t - 2d)] / 2,  x' = x_t - d V(x_t, t, t - d)

The paper's step size d is t - s here. Steps 2d are 1, 1/2, ..., 1/`finest` and start on the grid that a sampler with such
steps visits; targets come from the averaged student. The halves of the finest step are told d = 0, which is where the flow
rows are trained, so the whole ladder stands on `2 finest` Euler steps. On paths with a clock of their own the steps are
even in the clock, and the mean weighs both halves by their length in t.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...maths.average_velocity import average_velocity, composed, guided_velocity
from ...maths.laws import Law
from ...maths.losses import mse_rows
from ...maths.paths import add_noise
from ...roles import Role
from ..base import Levels, Paper, Total, Update
from .any_step import AnyStepConfig, AnyStepMethod, Quarters, split_rows

if TYPE_CHECKING:
    from ...data.batch import Batch, Cond
    from ...draws import Draw

TRAINED = {"ema": 0.999, "optimizer": {"lr": 1e-4, "weight_decay": 0.1}}


class ShortcutConfig(AnyStepConfig):
    """Knobs of `Shortcut`. Guidance is the usual scale, 1 = off."""

    terms: ClassVar[tuple[str, ...]] = ("flow", "consistency")
    finest: int = Field(default=128, gt=0, description="most steps of a sample; it and all halves of it are trained")
    consistency_share: Quarters = Field(default=0.25, gt=0, lt=1, description="of the rows that learn steps")
    time: Law = Field(default=Law(), description="of t in the flow rows")
    label_dropout: float = Field(default=0.1, ge=0, le=1, description="share of rows trained without condition")
    guidance_scale: float = Field(
        default=1.0, ge=0, description="trained into the student; a sample costs no second call"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ShortcutConfig:
        if self.finest & (self.finest - 1):
            raise ValueError(f"finest={self.finest} must be a power of two, so that steps can be halved")
        if self.sampler == "few":
            raise ValueError("sampler=few asks for steps from every level to 0, which are not trained: any or multi")
        if self.sampler == "any" and self.finest % self.steps:
            raise ValueError(f"steps={self.steps} must be 1, 2, 4, ... {self.finest}: no other step is trained")
        if self.guidance_scale != 1 and self.label_dropout == 0:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs label_dropout above 0: null is learned beside"
            )
        return self


class Step(NamedTuple):
    """A step of each row, from t by way of `middle` to s [rows]; `finest` [rows]: its halves are Euler steps."""

    t: Tensor
    middle: Tensor
    s: Tensor
    finest: Tensor

    def rows(self, index: Tensor) -> Step:
        """Some of the rows."""
        return Step(*(part[index] for part in self))


class Shortcut(AnyStepMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`) and one network."""

    name = "shortcut"
    paper = Paper("One Step Diffusion via Shortcut Models", "arXiv:2410.12557")
    proven = "measured"
    row_multiple = 4
    Config = ShortcutConfig

    def roles(self) -> tuple[Role, ...]:
        """The averaged student: a new network or a flow model, which gains the second time."""
        return (Role("student", tune="full", defaults=TRAINED, adds=("s",)),)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One call with gradient for all rows; each term counts by its share of them."""
        flow, long = split_rows(len(batch), self.config.consistency_share, draw.device)
        step = self.steps(draw).rows(long)
        clock = self.student.path.time(self.config.time.drawn(draw.within("time")))
        t, s = clock.index_copy(0, long, step.t), clock.index_copy(0, long, step.s)
        eps = draw.normal("eps", *batch.x0.shape[1:])
        x, v = add_noise(batch.x0, eps, t), eps - batch.x0
        dropped = draw.choice("dropout", self.config.label_dropout)
        cond = self.student.dropped(batch.cond, dropped)
        target = v.index_copy(0, flow, self.guided(x[flow], v[flow], t[flow], batch.cond[flow], dropped[flow]))
        target = target.index_copy(0, long, self.taught(x[long], step, cond[long]))
        error = mse_rows(average_velocity(self.student, x, t, s, cond), target)
        parts = {name: rows for name, rows in (("flow", flow), ("consistency", long)) if len(rows)}
        yield Update(
            "student",
            {name: error[rows] * (len(rows) / len(error)) for name, rows in parts.items()},
            levels={name: Levels(error[rows], t[rows]) for name, rows in parts.items()},
        )

    def steps(self, draw: Draw) -> Step:
        """A step of each row: its length one of 1, 1/2, ..., 1/finest of the clock, its place any on their grid."""
        path, finest = self.student.path, self.config.finest
        u = torch.tensor((*path.grid(2 * finest), 0.0), dtype=torch.float64, device=draw.device)
        times = torch.where(u > 0, path.time(u), 0.0).float()
        halvings = finest.bit_length() - 1
        level = draw.integers("level", halvings + 1)
        width = 2 * finest >> level
        start = (draw.integers("place", finest) >> (halvings - level)) * width
        return Step(times[start], times[start + width // 2], times[start + width], level == halvings)

    @torch.no_grad()
    def taught(self, x: Tensor, step: Step, cond: Cond) -> Tensor:
        """The mean velocity of two half steps of the averaged student."""
        with self.student.averaged():
            return composed(self.student, x, step.t, step.middle, step.s, cond, instant=step.finest)

    def guided(self, x: Tensor, v: Tensor, t: Tensor, cond: Cond, dropped: Tensor) -> Tensor:
        """g v + (1 - g) V(x, t, t, null) with the averaged student in rows that have a condition, v in the others."""
        if self.config.guidance_scale == 1:
            return v
        with self.student.averaged():
            target = guided_velocity(self.student, x, v, t, cond, self.config.guidance_scale)
        return torch.where(dropped.reshape(-1, *[1] * (v.ndim - 1)), v, target)

    def steps_offered(self) -> tuple[int, ...]:
        """The powers of two up to `finest`."""
        return tuple(2**k for k in range(self.config.finest.bit_length()))
