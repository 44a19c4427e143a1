"""The common part of methods that distil along the teacher's trajectory: LCM, SCott, RG-LCD, PCM.

A row is noised to a level u of a grid; the teacher, guided, walks it down to u_next; the student's f at u is compared
with the averaged student's f at u_next. What differs between the methods is the walk, the place compared at, and what
is added to the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...data.batch import Cond
from ...errors import UserError
from ...maths.consistency import below, boundary, ode_step, pick, walk
from ...maths.guidance import guided_x0
from ...maths.losses import mse_rows, pseudo_huber_rows
from ...maths.paths import FlowPath, Path, VPPath, add_noise
from ...maths.solvers import Kind, Schedule
from ...roles import Role
from ..base import DiffusionMethod, MethodConfig

if TYPE_CHECKING:
    from ...draws import Draw
    from ...models.denoiser import Denoiser


class TrajectoryConfig(MethodConfig):
    """Knobs that all of them have; guidance is the usual scale (1 = off), so a paper's w is guidance_scale - 1."""

    terms: ClassVar[tuple[str, ...]] = ("consistency",)
    steps: tuple[int, ...] = Field(default=(1, 2, 4, 8), description="numbers of steps the student is meant for")
    levels: int | None = Field(default=None, gt=0, description="of the grid; null: 50 on DDPM tables, 48 on flow paths")
    skip: float | None = Field(
        default=None, gt=0, lt=1, description="clock from a level to its target; null: one level"
    )
    guidance_scale: float | tuple[float, float] = Field(
        default=(3.0, 15.0), description="of the teacher: a number, or the range that each row draws from"
    )
    embed_guidance: bool = Field(default=True, description="a drawn guidance is an input of the student")
    sample_guidance: float | None = Field(default=None, description="fed to the student when sampled; null: mid-range")
    distance: Literal["huber", "l2"] = "huber"
    huber_c: float = Field(default=1e-3, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> TrajectoryConfig:
        scale = self.guidance_scale
        if isinstance(scale, tuple) and scale[0] >= scale[1]:
            raise ValueError(f"guidance_scale={list(scale)} is upside down: write the smaller end first")
        if min(scale if isinstance(scale, tuple) else (scale,)) < 0:
            raise ValueError(f"guidance_scale={scale} must not be negative")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps={self.steps} must be one or more numbers of at least 1")
        return self

    @property
    def embedded(self) -> bool:
        """Whether the student is told the guidance."""
        return self.embed_guidance and isinstance(self.guidance_scale, tuple)


class Interval(NamedTuple):
    """Clock values [rows], float64: where the student looks, and how far the teacher walks."""

    u: Tensor
    u_next: Tensor


class TrajectoryMethod(DiffusionMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`), a frozen teacher and a student that starts as it."""

    teacher: Denoiser
    student: Denoiser

    def roles(self) -> tuple[Role, ...]:
        """Teacher and student; the student's EMA is the consistency target."""
        return (Role("teacher"), self.student_role())

    def student_role(self, name: str = "student") -> Role:
        """A role that starts as the teacher, gains the guidance input when there is a range, and is averaged."""
        adds = ("guidance",) if self.config.embedded else ()
        return Role(name, "full", "teacher", defaults={"ema": 0.95, "optimizer": {"lr": 8e-6}}, adds=adds)

    # ---- the grid

    @property
    def path(self) -> Path:
        """The student's path."""
        return self.student.path

    @property
    def levels(self) -> int:
        """Levels of the grid."""
        if self.config.levels is not None:
            return self.config.levels
        return 50 if isinstance(self.path, VPPath) else 48

    def grid(self) -> tuple[float, ...]:
        """The clock values that the student is trained at, from noise downwards."""
        return self.path.grid(self.levels)

    def interval(self, draw: Draw) -> Interval:
        """A level of the grid for each row, all equally likely, and the clock value below it."""
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=draw.device)
        u = grid[draw.integers("level", len(grid))]
        return Interval(u, below(u, self.path, self.levels, self.skip(draw.step)))

    def skip(self, step: int) -> float | None:
        """Clock from a level to its target at this step of training; None: one level."""
        return self.config.skip

    def noised(self, x0: Tensor, u: Tensor, draw: Draw) -> Tensor:
        """x_t = (1 - t) x0 + t eps at clock values u [rows]."""
        return add_noise(x0, draw.normal("eps", *x0.shape[1:]), self.time(u))

    def time(self, u: Tensor) -> Tensor:
        """Flow times as networks take them, float32."""
        return self.path.time(u.double()).float()

    # ---- teacher and student

    def guidance(self, draw: Draw) -> Tensor | float:
        """The teacher's guidance: the fixed number, or one drawn for each row."""
        scale = self.config.guidance_scale
        return draw.uniform("guidance", low=scale[0], high=scale[1]) if isinstance(scale, tuple) else scale

    def told(self, cond: Cond, guidance: Tensor | float) -> Cond:
        """What the student is told: the condition, and the guidance when it has that input."""
        if not self.config.embedded:
            return cond
        assert isinstance(guidance, Tensor)
        return cond.with_(guidance=guidance)

    def f(self, role: Denoiser, x: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """The consistency function of `role` at clock values u [rows]."""
        t = self.time(u)
        return boundary(self.path, x, role.x0(x, t, cond), t)

    @torch.no_grad()
    def walked(self, x: Tensor, at: Interval, cond: Cond, guidance: Tensor | float, draw: Draw) -> Tensor:
        """Where the guided teacher takes x from u to u_next: one DDIM step."""
        return walk(x, *at, self.path, self.guided(cond, guidance), ode_step, substeps=1)

    def guided(self, cond: Cond, guidance: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
        """The teacher's guided clean prediction as a function of (x, t)."""
        return lambda x, t: guided_x0(self.teacher, x, t, cond, guidance)

    @torch.no_grad()
    def target(self, x: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """f of the averaged student."""
        with self.student.averaged():
            return self.f(self.student, x, u, cond)

    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The distance [rows]."""
        if self.config.distance == "l2":
            return mse_rows(prediction, target)
        return pseudo_huber_rows(prediction, target, self.config.huber_c)

    # ---- sampling

    def schedule(self) -> Schedule:
        """Denoise and noise again, at `max(steps)` levels of the grid."""
        return self.schedule_for(max(self.config.steps), "renoise")

    def schedule_for(self, steps: int, kind: Kind) -> Schedule:
        """`steps` levels of the grid. UserError when the exported flow scheduler would visit levels not trained."""
        if isinstance(self.path, FlowPath) and self.levels % steps:
            raise UserError(
                f"config.levels={self.levels} is no multiple of {steps} steps, so sampling would visit untrained levels"
            )
        u = pick(self.grid(), steps)
        origin = self.levels if len(u) < self.levels else None
        return Schedule(kind, u, guidance=self.fed_guidance(), embedded=self.config.embedded, origin=origin)

    def fed_guidance(self) -> float:
        """What the student is told when sampled; 1 when it has no such input."""
        said, scale = self.config.sample_guidance, self.config.guidance_scale
        if not self.config.embedded:
            return 1.0
        return sum(scale) / 2 if said is None else said

    def steps_offered(self) -> tuple[int, ...]:
        """As configured."""
        return tuple(sorted(self.config.steps))
