"""MeanFlow (Geng et al., arXiv 2505.13447): average velocities from their own identity, without a teacher.

    x_t = (1 - t) x0 + t eps,  v = eps - x0,   u(x_t, t, s) = v - (t - s) du/dt,  du/dt = v . grad_x u + d_t u
    L = w |u - sg[v~ - (t - s) du/dt]|^2,  w = 1 / (|residual|^2 + c)^p,  |.| over all elements of a row

Every fourth row has s < t; in the others s = t, where the loss is that of flow matching. Guidance of scale g is trained
into u: in place of v, also as the direction of du/dt, stands

    v~ = (1 - k) [g v + (1 - g) u(x, t, t, null)] + k u(x, t, t, c)

whose fixed point at s = t is g v(x, t | c) + (1 - g) v(x, t) for every k: with u(x, t, t, c) = E v~ the two terms in k
cancel. The paper writes omega = (1 - k) g, so that its effective scale omega / (1 - k) is g. Rows without condition, and
rows whose t lies outside of `guidance_interval`, keep v~ = v.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...maths.average_velocity import average_velocity, guided_velocity, slope_along
from ...maths.derivative import How
from ...maths.laws import Law
from ...maths.losses import mse_rows
from ...maths.paths import add_noise, expand
from ...roles import Role
from ..base import Levels, Paper, Total, Update
from .any_step import AnyStepConfig, AnyStepMethod, Quarters, split_rows

if TYPE_CHECKING:
    from ...data.batch import Batch, Cond
    from ...draws import Draw

TRAINED = {"ema": 0.9999, "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]}}


class MeanFlowConfig(AnyStepConfig):
    """Knobs of `MeanFlow`. Guidance is the usual scale, 1 = off."""

    terms: ClassVar[tuple[str, ...]] = ("identity",)
    time: Law = Field(default=Law(kind="logit_normal", loc=-0.4), description="of t and s, the larger being t")
    interval_share: Quarters = Field(default=0.25, description="of the rows that have s < t")
    label_dropout: float = Field(default=0.1, ge=0, le=1, description="share of rows trained without condition")
    guidance_scale: float = Field(
        default=1.0, ge=0, description="trained into the student; a sample costs no second call"
    )
    guidance_mix: float = Field(
        default=0.0, ge=0, lt=1, description="k: the share of the student's own guided velocity"
    )
    guidance_interval: tuple[float, float] = Field(default=(0.0, 1.0), description="times t at which it is guided")
    weight_power: float = Field(default=1.0, ge=0, description="p of w = 1 / (|residual|^2 + c)^p")
    weight_floor: float = Field(default=1e-3, gt=0, description="c of the weight")
    derivative: How = Field(default="jvp", description="how du/dt is found; central where jvp is not implemented")
    derivative_step: float | None = Field(
        default=None, gt=0, description="h of central and backward; null: .005, or .05 when computing in bf16"
    )

    @model_validator(mode="after")
    def _can_be_guided(self) -> MeanFlowConfig:
        low, high = self.guidance_interval
        if self.guidance_scale != 1 and (self.label_dropout == 0 or low >= high):
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs label_dropout above 0, since the unconditional branch is "
                "learned beside, and a guidance_interval that increases"
            )
        return self


class MeanFlow(AnyStepMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`) and one network."""

    name = "meanflow"
    paper = Paper("Mean Flows for One-step Generative Modeling", "arXiv:2505.13447")
    proven = "measured"
    row_multiple = 4
    Config = MeanFlowConfig

    def roles(self) -> tuple[Role, ...]:
        """The student: a new network or a flow model, which gains the second time."""
        return (Role("student", tune="full", defaults=TRAINED, adds=("s",)),)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One regression on the identity's right side."""
        parts = self.parts(len(batch), draw.device)
        t, s = self.times(parts["interval"], draw)
        eps = draw.normal("eps", *batch.x0.shape[1:])
        dropped = draw.choice("dropout", self.config.label_dropout)
        x, v = add_noise(batch.x0, eps, t), eps - batch.x0
        v = self.guided(x, v, t, batch.cond, dropped)
        cond = self.student.dropped(batch.cond, dropped)
        target = self.target(x, v, t, s, cond, parts["interval"])
        error = mse_rows(average_velocity(self.student, x, t, s, cond), target)
        seen = {name: rows for name, rows in parts.items() if len(rows)}
        yield Update(
            "student",
            {"identity": self.weighted(error * v[0].numel())},
            metrics={f"{name}_error": error.detach()[rows] for name, rows in seen.items()},
            levels={name: Levels(error[rows], t[rows]) for name, rows in seen.items()},
        )

    def parts(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Row numbers of "flow", where s = t, and "interval", where s < t."""
        flow, interval = split_rows(rows, self.config.interval_share, device)
        return {"flow": flow, "interval": interval}

    def times(self, interval: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """t and s [rows], the larger and the smaller of two draws; s = t outside of the rows `interval`."""
        path, law = self.student.path, self.config.time
        a, b = (path.time(law.drawn(draw.within(name))) for name in ("a", "b"))
        t = torch.maximum(a, b)
        return t, t.index_copy(0, interval, torch.minimum(a, b)[interval])

    def guided(self, x: Tensor, v: Tensor, t: Tensor, cond: Cond, dropped: Tensor) -> Tensor:
        """v~ of the rows that have a condition and a t within the interval, v of the others."""
        config = self.config
        if config.guidance_scale == 1:
            return v
        low, high = config.guidance_interval
        rows = ~dropped & (t >= low) & (t <= high)
        target = guided_velocity(self.student, x, v, t, cond, config.guidance_scale, config.guidance_mix)
        return torch.where(rows.reshape(-1, *[1] * (v.ndim - 1)), target, v)

    def target(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Cond, interval: Tensor) -> Tensor:
        """v - (t - s) du/dt; the derivative is asked of the rows `interval` alone, since t - s is 0 in the others."""
        if not len(interval):
            return v
        i, config = interval, self.config
        slope = slope_along(self.student, x[i], v[i], t[i], s[i], cond[i], config.derivative, self.step)
        return v.index_add(0, i, -expand((t - s)[i], slope) * slope)

    @property
    def step(self) -> float:
        """h of the differences."""
        return self.config.derivative_step or (5e-3 if self.student.autocast is None else 5e-2)

    def weighted(self, square: Tensor) -> Tensor:
        """w |residual|^2 [rows] of squares summed over a row; no gradient goes through w."""
        return square * (square.detach() + self.config.weight_floor) ** -self.config.weight_power
