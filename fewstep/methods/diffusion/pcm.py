"""Phased consistency models (Wang et al., arXiv 2405.18407): consistency within each of M pieces of the trajectory.

    F(x_t, t) = x_t + (e - t) v_theta(x_t, t),   e the lower edge of t's phase
    L = huber( F_theta(x_t, t), sg F_theta(x_s, s) ),   x_s a guided DDIM step of the teacher from t to the level below

F is DDIM's jump to the edge, the identity at the edge itself, so no averaged copy and no boundary scaling is needed.
Sampling goes from edge to edge without noise. The edges are the levels of the exported M-step schedule.

With `adversarial`, heads on the frozen teacher's features tell the student's edge states from those of the target, both
diffused to one random level inside the phase; student and heads then take turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...data.batch import Cond
from ...maths.consistency import noised_further
from ...maths.guidance import guided
from ...maths.losses import discriminator_rows, generator_rows
from ...maths.paths import expand
from ...maths.scalars import Scalar
from ...maths.solvers import Kind, Schedule
from ...nets.discriminator import Discriminator
from ...roles import Handle, Role
from ..base import Paper, Total, Update
from .trajectory import TrajectoryConfig, TrajectoryMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.batch import Batch
    from ...draws import Draw


class PCMConfig(TrajectoryConfig):
    """Knobs of `PCM`. `weights`: consistency, adversarial for the student; discriminator for the heads."""

    default_weights: ClassVar[Mapping[str, Scalar]] = {"adversarial": 0.1}
    terms: ClassVar[tuple[str, ...]] = ("consistency", "adversarial", "discriminator")
    steps: tuple[int] = Field(default=(4,), description="M: phases, and steps of the sampler; one number")
    levels: int = Field(default=48, gt=0, description="of the grid, a multiple of the phases")
    skip: None = Field(default=None, description="no choice here: the target is at the level below")
    guidance_scale: float | tuple[float, float] = Field(
        default=(5.0, 6.0), description="of the teacher: a number, or the range that each row draws from"
    )
    embed_guidance: bool = Field(default=False, description="a drawn guidance is an input of the student")
    sample_guidance: float | None = Field(
        default=None, description="of the sampler: fed to a student with that input (null: mid-range), else applied"
    )
    label_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of rows without condition")
    adversarial: bool = Field(
        default=False, description="heads on the teacher's features; they and the student alternate"
    )
    gan_layers: tuple[str, ...] | None = Field(default=None, description="submodules; null: the family's deepest")

    @model_validator(mode="after")
    def _whole_phases(self) -> PCMConfig:
        if self.levels % self.phases:
            raise ValueError(f"levels={self.levels} must be a multiple of the {self.phases} phases in steps")
        return self

    @property
    def phases(self) -> int:
        """M."""
        return self.steps[0]


class Place(NamedTuple):
    """Clock values [rows], float64: of the student, of its target, and of the ends of the phase they lie in."""

    u: Tensor
    u_next: Tensor
    edge: Tensor
    top: Tensor


class PCM(TrajectoryMethod):
    """Needs samples with conditions, a teacher with an unconditional branch (or guidance_scale 1), and a student."""

    name = "pcm"
    paper = Paper("Phased Consistency Models", "arXiv:2405.18407")
    proven = "measured"
    Config = PCMConfig
    discriminator: Handle

    def roles(self) -> tuple[Role, ...]:
        """Teacher, an adapter on it as the student, and the discriminator's heads."""
        if not self.config.adversarial:
            return (Role("teacher"), self.student_role())
        heads = Role("discriminator", "full", build=self._heads, defaults={"optimizer": {"lr": 1e-5}})
        return (Role("teacher"), self.student_role(), heads)

    def student_role(self, name: str = "student") -> Role:
        """An adapter without an averaged copy."""
        trained = {"lora": {"rank": 64}, "optimizer": {"lr": 5e-6, "weight_decay": 1e-3}}
        adds = ("guidance",) if self.config.embedded else ()
        return Role(name, "lora", "teacher", defaults=trained, adds=adds)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One jump to the edge from two neighbouring levels; with a discriminator every other step is its own."""
        guidance, at = self.guidance(draw), self.place(draw)
        said = self.dropped(batch.cond, draw)
        c, x = self.told(said, guidance), self.noised(batch.x0, at.u, draw)
        target = self.target_at(at, x, said, c, guidance)
        turn = not self.config.adversarial or draw.step % 2 == 0
        with torch.set_grad_enabled(turn):
            made = self.jump(x, at.u, at.edge, c)
        if turn:
            yield self.student_update(made, target, at, said, draw)
        else:
            yield Update("discriminator", {"discriminator": self.discrimination(target, made, at, said, draw)})

    def student_update(self, made: Tensor, target: Tensor, at: Place, cond: Cond, draw: Draw) -> Update:
        """The consistency term, and relu(1 - D) when there is a discriminator."""
        losses = {"consistency": self.compare(made, target)}
        if self.config.adversarial:
            losses["adversarial"] = generator_rows(self.logits([made], at, cond, draw)[0], "margin")
        return Update("student", losses)

    def discrimination(self, real: Tensor, made: Tensor, at: Place, cond: Cond, draw: Draw) -> Tensor:
        """The hinge loss [rows]: what the target says counts as real, no data is shown."""
        seen, fake = self.logits([real, made], at, cond, draw)
        return discriminator_rows(seen, fake, "hinge")

    # ---- phases

    def place(self, draw: Draw) -> Place:
        """A level for each row, all equally likely, the level below, and the phase it lies in."""
        levels, width = self.config.levels, self.config.levels // self.config.phases
        grid = torch.tensor([*self.grid(), 0.0], dtype=torch.float64, device=draw.device)
        i = draw.integers("level", levels)
        top = i - i % width
        return Place(grid[i], grid[i + 1], grid[top + width], grid[top])

    def jump(self, x: Tensor, u: Tensor, edge: Tensor, cond: Cond) -> Tensor:
        """F of the student: from x at u straight to the edge of the phase."""
        t = self.exact_time(u)
        return x + expand(self.exact_time(edge) - t, x) * self.student.velocity(x, t.float(), cond)

    @torch.no_grad()
    def target_at(self, at: Place, x: Tensor, said: Cond, told: Cond, guidance: Tensor | float) -> Tensor:
        """F of the student from where the guided teacher takes x in one DDIM step."""
        t, t_next = self.exact_time(at.u), self.exact_time(at.u_next)
        below = x + expand(t_next - t, x) * guided(self.teacher, x, t.float(), said, guidance)
        return self.jump(below, at.u_next, at.edge, told)

    def exact_time(self, u: Tensor) -> Tensor:
        """Flow times in float64; the last edge is t = 0 on every path, as in the exported DDIM."""
        return torch.where(u > 0, self.path.time(u.double()), torch.zeros_like(u))

    def dropped(self, cond: Cond, draw: Draw) -> Cond:
        """`cond` with a share of its rows made unconditional, for students that are sampled with guidance."""
        share = self.config.label_dropout
        return self.student.dropped(cond, draw.choice("dropout", share)) if share else cond

    # ---- discriminator

    def logits(self, states: Sequence[Tensor], at: Place, cond: Cond, draw: Draw) -> tuple[Tensor, ...]:
        """Logits [rows] of states at the edge, all diffused to one random level of the phase with one noise."""
        s = self.exact_time(at.edge)
        t = self.exact_time(draw.uniform("adversarial.u", low=at.edge, high=at.top).double())
        noise = draw.normal("adversarial.eps", *states[0].shape[1:])
        x = torch.cat([noised_further(state, s, t, noise) for state in states])
        times, conds = torch.cat([t.float()] * len(states)), Cond.cat([cond] * len(states))
        features = self.teacher.features(x, times, conds, self.config.gan_layers)
        return self.discriminator(features).chunk(len(states))

    def _heads(self, handles: Mapping[str, Handle]) -> Discriminator:
        from ...models.denoiser import Denoiser

        return Discriminator.reading(Denoiser.of(handles["teacher"]), self.config.gan_layers)

    # ---- sampling

    def schedule(self) -> Schedule:
        """From edge to edge along the velocity."""
        return self.schedule_for(self.config.phases, "ode")

    def schedule_for(self, steps: int, kind: Kind) -> Schedule:
        """`steps` levels; they are the upper edges of the phases."""
        applied = 1.0 if self.config.sample_guidance is None else self.config.sample_guidance
        fed = self.fed_guidance() if self.config.embedded else applied
        return Schedule(kind, self.path.grid(steps), guidance=fed, embedded=self.config.embedded)
