"""sCM, continuous-time consistency (Lu and Song, arXiv 2410.11081): distilled from a teacher or trained on data alone.

    f(y, t) = y - t v(y, t),   g = cos(a) df/da along the trajectory,   g <- g / (|g| + c)
    L = e^w(a) / D |F - sg[F + g]|^2 - w(a),   e^-w(a) = E |.|^2 / D at the optimum

    distill (sCD)    dy/dt is the velocity of the (guided) teacher
    train   (sCT)    dy/dt is eps - x0, the pair's own; the expected gradient is that of the data's true trajectories

F is the paper's network (TrigFlow), an exact function of v: a flow network plays both parts without being retrained, see
`maths/trigflow.py`. No averaged target and no grid. The second part of g, which holds the derivative of the network along
the trajectory, is faded in over `tangent_warmup` steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...maths.derivative import How, derivative
from ...maths.guidance import guided
from ...maths.laws import Law
from ...maths.losses import mse_rows, rows_mean
from ...maths.paths import add_noise, expand
from ...maths.solvers import Schedule
from ...maths.trigflow import Shape, angle, consistency_tangent, shaped, trigflow
from ...nets.weight_head import WeightHead
from ...roles import Handle, Role
from ..base import DiffusionMethod, Levels, MethodConfig, Paper, Total, Update

if TYPE_CHECKING:
    from ...data.batch import Batch, Cond
    from ...draws import Draw
    from ...models.denoiser import Denoiser

AVERAGED = {"ema": 0.9999, "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]}}


class SCMConfig(MethodConfig):
    """Knobs of `SCM`. Guidance is the teacher's, on the usual scale (1 = off), so it goes with `mode: distill` alone."""

    terms: ClassVar[tuple[str, ...]] = ("consistency",)
    mode: Literal["distill", "train"] = "distill"
    steps: tuple[int, ...] = Field(default=(1, 2, 4, 8), description="numbers of steps the student is offered for")
    data_std: float = Field(default=0.5, gt=0, description="sigma_d, of what the network makes: pixels or latents")
    time: Law = Field(
        default=Law(kind="logit_normal", loc=-1.0, scale=1.4),
        description="of flow time t: log(sigma_d tan a) is normal with the paper's P_mean and P_std",
    )
    guidance_scale: float | tuple[float, float] = Field(
        default=1.0, description="of the teacher: a number, or the range that each row draws from and tells"
    )
    sample_guidance: float | None = Field(default=None, description="fed to the student when sampled; null: mid-range")
    tangent: Shape = Field(default="norm", description="what is done to g: norm, rms, clip to [-1, 1], none")
    tangent_floor: float = Field(default=0.1, gt=0, description="c of g / (|g| + c)")
    tangent_warmup: int = Field(default=10_000, ge=0, description="steps over which r of g grows from 0 to 1")
    derivative: How = Field(default="jvp", description="how dv/dt is found; central where jvp is not implemented")
    derivative_step: float = Field(default=5e-3, gt=0, description="h of central and backward")

    @model_validator(mode="after")
    def _consistent(self) -> SCMConfig:
        scale = self.guidance_scale
        if self.mode == "train" and scale != 1:
            raise ValueError(f"guidance_scale={scale} needs a teacher: write mode: distill, or remove it")
        if isinstance(scale, tuple) and not 0 <= scale[0] < scale[1]:
            raise ValueError(f"guidance_scale={list(scale)} must increase, from 0 or more")
        if not isinstance(scale, tuple) and self.sample_guidance is not None:
            raise ValueError("sample_guidance goes with a range: a single guidance_scale is baked into the student")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps={self.steps} must be one or more numbers of at least 1")
        return self

    @property
    def embedded(self) -> bool:
        """Whether the student is told the guidance."""
        return isinstance(self.guidance_scale, tuple)


class SCM(DiffusionMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`) and a student; with `mode: distill` a teacher."""

    name = "scm"
    paper = Paper("Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", "arXiv:2410.11081")
    proven = "measured"
    Config = SCMConfig
    teacher: Denoiser
    student: Denoiser
    weight: Handle

    def roles(self) -> tuple[Role, ...]:
        """Teacher, averaged student and adaptive weight; without a teacher the recipe says where the student comes from."""
        weight = Role("weight", "full", build=lambda _: WeightHead(), defaults={"optimizer": {"lr": 1e-2}})
        if self.config.mode == "train":
            return (Role("student", "full", defaults=AVERAGED), weight)
        adds = ("guidance",) if self.config.embedded else ()
        return (Role("teacher"), Role("student", "full", "teacher", defaults=AVERAGED, adds=adds), weight)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One regression of F on itself, moved along the tangent."""
        guidance, t, eps = self.guidance(draw), self.times(draw), draw.normal("eps", *batch.x0.shape[1:])
        y, cond = add_noise(batch.x0, eps, t), self.told(batch.cond, guidance)
        moves = eps - batch.x0 if self.config.mode == "train" else self.taught(y, t, batch.cond, guidance)
        v = self.student.velocity(y, t, cond)
        found = self.tangent(y, v.detach(), moves, t, cond, self.warm(draw.step))
        error = self.error(v, y, t, shaped(found, self.config.tangent, self.config.tangent_floor))
        w = self.weight(angle(t, self.config.data_std))
        yield Update(
            ("student", "weight"),
            {"consistency": w.exp() * error - w},
            metrics={"x0_std": _std(y - expand(t, y) * v.detach()), "tangent": found.flatten(1).norm(dim=1), "w": w},
            levels={"tangent": Levels(rows_mean(found**2), t)},
        )

    # ---- the tangent

    def times(self, draw: Draw) -> Tensor:
        """t [rows] by `time`, within what the student's path has."""
        path = self.student.path
        return self.config.time.drawn(draw.within("time")).clamp(path.t_min, path.t_max)

    def warm(self, step: int) -> float:
        """r after `step` steps."""
        return min(1.0, step / self.config.tangent_warmup) if self.config.tangent_warmup else 1.0

    @torch.no_grad()
    def taught(self, y: Tensor, t: Tensor, cond: Cond, guidance: Tensor | float) -> Tensor:
        """The guided teacher's velocity at y."""
        return guided(self.teacher, y, t, cond, guidance)

    @torch.no_grad()
    def tangent(self, y: Tensor, v: Tensor, moves: Tensor, t: Tensor, cond: Cond, warm: float = 1.0) -> Tensor:
        """g at y, where the student answers v, along a trajectory of velocity `moves`."""

        def along(s: Tensor) -> Tensor:
            return self.student.velocity(y + expand(s - t, y) * moves, s, cond)

        high = self.student.path.t_max
        slope = derivative(along, t, self.config.derivative, self.config.derivative_step, high)[1]
        return consistency_tangent(moves - v, slope, t, self.config.data_std, warm)

    def error(self, v: Tensor, y: Tensor, t: Tensor, g: Tensor) -> Tensor:
        """|F - sg[F + g]|^2 / D [rows], F the student's answer v as the paper's network gives it."""
        f = trigflow(self.config.data_std).output(v, y, expand(t, y))
        return mse_rows(f, f.detach() + g)

    # ---- guidance

    def guidance(self, draw: Draw) -> Tensor | float:
        """The teacher's guidance: the fixed number, or one drawn for each row."""
        scale = self.config.guidance_scale
        return draw.uniform("guidance", low=scale[0], high=scale[1]) if isinstance(scale, tuple) else scale

    def told(self, cond: Cond, guidance: Tensor | float) -> Cond:
        """What the student is told: the condition, and the guidance when it is drawn."""
        return cond.with_(guidance=guidance) if isinstance(guidance, Tensor) else cond

    # ---- sampling

    def schedule(self) -> Schedule:
        """Denoise and noise again, at `max(steps)` levels."""
        return self.schedule_for(max(self.config.steps))

    def schedule_for(self, steps: int) -> Schedule:
        """The plain grid of `steps` levels: every time was trained, so any grid does."""
        return Schedule("renoise", self.student.path.grid(steps), **self.fed())

    def fed(self) -> dict[str, Any]:
        """What the student is told when sampled, if it is told a guidance."""
        scale, said = self.config.guidance_scale, self.config.sample_guidance
        if not isinstance(scale, tuple):
            return {}
        return {"guidance": sum(scale) / 2 if said is None else said, "embedded": True}

    def steps_offered(self) -> tuple[int, ...]:
        """As configured."""
        return tuple(sorted(self.config.steps))


def _std(x: Tensor) -> Tensor:
    """The std of each row."""
    return x.flatten(1).std(1, correction=0)
