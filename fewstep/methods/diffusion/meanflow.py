"""MeanFlow (Geng et al., arXiv 2505.13447): average velocities from their own identity, without a teacher.

    x_t = (1 - t) x0 + t eps,  v = eps - x0,   u(x_t, t, s) = v - (t - s) du/dt,  du/dt = v . grad_x u + d_t u
    L = w |u - sg[v - (t - s) du/dt]|^2,  w = 1 / (|residual|^2 + c)^p

In a share of the rows s < t; in the others s = t, where the loss is that of flow matching.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...maths.average_velocity import average_velocity
from ...maths.derivative import How, derivative
from ...maths.laws import Law
from ...maths.losses import mse_rows
from ...maths.paths import add_noise, expand
from ...roles import Role
from ..base import Levels, Paper, Total, Update
from .any_step import AnyStepConfig, AnyStepMethod

if TYPE_CHECKING:
    from ...data.batch import Batch, Cond
    from ...draws import Draw


class MeanFlowConfig(AnyStepConfig):
    """Knobs of `MeanFlow`."""

    terms: ClassVar[tuple[str, ...]] = ("identity",)
    time: Law = Field(default=Law(kind="logit_normal", loc=-0.4), description="of t and s, the larger being t")
    interval_share: float = Field(default=0.25, ge=0, le=1, description="of the rows that have s < t")
    label_dropout: float = Field(default=0.1, ge=0, le=1, description="share of rows trained without condition")
    weight_power: float = Field(default=1.0, ge=0, description="p of w = 1 / (|residual|^2 + c)^p")
    weight_floor: float = Field(default=1e-3, gt=0, description="c of the weight")
    derivative: How = Field(default="jvp", description="how du/dt is found; central where jvp is not implemented")
    derivative_step: float = Field(default=5e-3, gt=0, description="h of central and backward")


class MeanFlow(AnyStepMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`) and one network."""

    name = "meanflow"
    paper = Paper("Mean Flows for One-step Generative Modeling", "arXiv:2505.13447")
    Config = MeanFlowConfig

    def roles(self) -> tuple[Role, ...]:
        """The student: a new network or a flow model, which gains the second time."""
        return (Role("student", tune="full", defaults={"ema": 0.999}, adds=("s",)),)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One regression on the identity's right side."""
        t, s = self.times(draw)
        eps = draw.normal("eps", *batch.x0.shape[1:])
        cond = self.student.dropped(batch.cond, draw.choice("dropout", self.config.label_dropout))
        x, v = add_noise(batch.x0, eps, t), eps - batch.x0
        target = v - expand(t - s, v) * self.slope(x, v, t, s, cond)
        error = mse_rows(average_velocity(self.student, x, t, s, cond), target)
        weight = (error.detach() * v[0].numel() + self.config.weight_floor) ** -self.config.weight_power
        yield Update("student", {"identity": weight * error}, levels={"identity": Levels(error, t)})

    def times(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """t and s [rows], the larger and the smaller of two draws; s = t in most rows."""
        path, law = self.student.path, self.config.time
        a, b = (path.time(law.drawn(draw.within(name))) for name in ("a", "b"))
        t = torch.maximum(a, b)
        return t, torch.where(draw.choice("interval", self.config.interval_share), torch.minimum(a, b), t)

    def slope(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """du/dt along the path, without a graph."""

        def u(at: Tensor) -> Tensor:
            return average_velocity(self.student, x + expand(at - t, x) * v, at, s, cond)

        return derivative(u, t, self.config.derivative, self.config.derivative_step)[1]
