"""TwinFlow (Cheng et al., arXiv 2512.05150): any-step velocities, and a twin of them at negative time.

One network V(x, t, s). At t it learns average velocities by RCGM (`maths.rcgm`); called with sign -1 it learns the
velocity of its own one-step outputs; and those are moved by the difference of the two fields:

    adversarial     d( V(x_t, t, t; -1), eps - x^ ),   x_t = (1 - t) x^ + t eps,   x^ = sg[z - V(z, 1, 0)]
    rectification   d( V(z, 1, 0), sg[V(z, 1, 0) - G] ),   G = V(q, u, u; -1) - V(q, u, u),   q = (1 - u) sg[x^] + u n

That is distribution matching with real score, fake score and generator in one network: x^ moves along +G.

Rows of a batch serve in turn, in groups of fixed composition: `e2e` the whole way from noise, `mul` nearly s = t, `any`
s < t at random, `one` s = 0, `adv` the twin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...data.batch import Cond
from ...draws import Draw
from ...errors import UserError
from ...maths import rcgm
from ...maths.average_velocity import average_velocity, landing
from ...maths.guidance import guided
from ...maths.laws import Law
from ...maths.losses import rows_mean
from ...maths.paths import Path, add_noise, expand
from ...maths.rcgm import Dealt, Guide, Metric, Part
from ...maths.solvers import Schedule, sample
from ...roles import Role
from ..base import Levels, Paper, Total, Update
from .any_step import AnyStepConfig, AnyStepMethod

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...models.denoiser import Denoiser
    from ...roles import Handle
    from ...store import Store

TWIN_STEPS = 20


class TwinFlowConfig(AnyStepConfig):
    """Knobs of `TwinFlow`. `weights`: rcgm, adversarial, rectification. Guidance is the usual scale, 1 = off."""

    terms: ClassVar[tuple[str, ...]] = ("rcgm", "adversarial", "rectification")
    parts: dict[Part, int] = Field(
        default={}, description="rows of each kind in a group; none said: e2e, mul, any, adv"
    )
    order: int = Field(default=2, ge=0, le=3, description="N, network calls in the roll-out; 0: flow matching")
    split: Literal["uniform", "random"] = Field(default="uniform", description="where the roll-out's levels are")
    target: Literal["average", "online"] | None = Field(
        default=None, description="null: average, and at order 1 online"
    )
    derivative_step: float = Field(default=0.01, gt=0, lt=1, description="D, the step along v before the roll-out")
    metric: Metric = Field(default="barron", description="d: l2 squares a row's error, barron takes its length")
    clamp: float | None = Field(default=1.0, gt=0, description="of each element of residual and G; null: none")
    guide: Guide = Field(default="self", description="self, base, or base_datafree, which opens no data")
    guidance_scale: float = Field(default=1.0, ge=1, description="w that is baked in; 5 in the paper's text models")
    guidance_interval: tuple[float, float] = Field(default=(0.0, 1.0), description="times t at which it acts")
    null_drop: float = Field(default=0.1, ge=0, le=1, description="share of the mul rows trained without condition")
    real_velocity: Literal["student", "teacher"] = Field(default="student", description="what G holds the twin against")
    time: Law = Field(default=Law(), description="t, within the path")
    rectification_time: Law = Field(default=Law(), description="u of the rectification")

    @model_validator(mode="after")
    def _consistent(self) -> TwinFlowConfig:
        if not self.group or min(self.parts.values(), default=1) < 0:
            raise ValueError(f"parts={self.parts} must say how many rows are of each kind, one or more in all")
        if self.order == 0 and set(self.group) - {"mul", "adv"}:
            raise ValueError("order 0 has no roll-out: it goes with parts mul and adv alone")
        if self.weights.get("rectification", 0) != 0 and not self.rectifies:
            raise ValueError("the rectification goes with e2e and adv rows: say both in parts, or give it weight 0")
        return self

    @property
    def group(self) -> tuple[Part, ...]:
        """The kinds of a group's rows, in order; batches are multiples of it."""
        usual: dict[Part, int] = {"e2e": 1, "mul": 1, "any" if self.order > 1 else "one": 1, "adv": 1}
        parts = self.parts or ({"mul": 1} if self.order == 0 else usual)
        return tuple(kind for kind in rcgm.SECOND for _ in range(parts.get(kind, 0)))

    @property
    def rectifies(self) -> bool:
        """Whether one-step outputs are moved by the difference of the two fields."""
        off = self.weights.get("rectification", 1.0) == 0
        return {"e2e", "adv"} <= set(self.group) and not off

    @property
    def averages(self) -> bool:
        """Whether targets come from the averaged student."""
        return self.order > 1 if self.target is None else self.target == "average"

    @property
    def guides(self) -> bool:
        """Whether the velocities of the path are replaced."""
        return self.guide == "base_datafree" or self.guidance_scale != 1

    @property
    def asks_teacher(self) -> bool:
        """Whether a frozen base takes part."""
        return (self.guide != "self" and self.guides) or (self.rectifies and self.real_velocity == "teacher")


class Asked(NamedTuple):
    """What the student is asked, row by row: the state x at t, told s; v = eps - x0."""

    x: Tensor
    v: Tensor
    t: Tensor
    s: Tensor
    cond: Cond

    def part(self, rows: slice) -> Asked:
        """Some of the rows."""
        fields: Any = (field[rows] for field in self)
        return Asked(*fields)


class TwinFlow(AnyStepMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`), or conditions alone with guide base_datafree."""

    name = "twinflow"
    paper = Paper(
        "TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows", "arXiv:2512.05150"
    )
    proven = "measured"
    Config = TwinFlowConfig
    teacher: Denoiser

    def __init__(self, config: TwinFlowConfig | None = None):
        super().__init__(config)
        self.row_multiple = len(self.config.group)

    def roles(self) -> tuple[Role, ...]:
        """The student, which gains the second time and the sign; a frozen base where the options ask for one."""
        usual = {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]}, "ema": 0.99, "ema_warmup": True}
        adds = ("s", "sign") if "adv" in self.config.group else ("s",)
        base = "teacher" if self.config.asks_teacher else None
        student = Role("student", "full", base, defaults=usual, adds=adds)
        return (Role("teacher"), student) if base else (student,)

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Store]) -> None:
        """UserError for an adapter that a stock pipeline could not call as the sampler wants."""
        super().bind(handles, sources, stores)
        if self.student.shifted and self.config.sampler != "few":
            raise UserError(
                "config.sampler: an adapter reads the second time from its label, and a stock pipeline's label means "
                "s = 0: write few"
            )

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One call with gradient for all rows; each of its parts counts by its share, the rectification by its own mean."""
        rows = rcgm.dealt(self.config.group, len(batch), draw.device)
        asked = self.asked(batch, rows, draw)
        answer = average_velocity(self.student, asked.x, asked.t, asked.s, asked.cond, self.sign(asked.t, rows))
        target = self.target(asked.part(rows.path), answer[rows.path].detach(), rows, draw)
        error = rcgm.metric_rows(answer, torch.cat([target, asked.v[rows.twin]]), self.config.metric)
        weight = torch.cat([rcgm.gap_weight(asked.t, asked.s)[rows.path], torch.ones_like(error[rows.twin])])
        terms = {"rcgm": rows.path, "adversarial": rows.twin}
        terms = {name: part for name, part in terms.items() if part.start < part.stop}
        shares = {name: (part.stop - part.start) / len(batch) for name, part in terms.items()}
        losses = {name: shares[name] * (weight * error)[part] for name, part in terms.items()}
        levels = {name: Levels(error[part], asked.t[part]) for name, part in terms.items()}
        metrics = {}
        if self.config.rectifies:
            at, whole = answer[rows.whole], asked.part(rows.whole)
            x0 = (whole.x - expand(whole.t, at) * at).detach()
            g = self.difference(x0, whole.cond, rows, draw.within("rectification"))
            losses["rectification"] = rcgm.metric_rows(at, (at - g).detach(), self.config.metric)
            metrics = {"difference_rms": rows_mean(g**2).sqrt(), "x0_std": x0.flatten(1).std(1, correction=0)}
        yield Update("student", losses, metrics=metrics, levels=levels)

    # ---- the rows of a step

    @property
    def has_twin(self) -> bool:
        """Whether rows train the field at negative time."""
        return "adv" in self.config.group

    def asked(self, batch: Batch, rows: Dealt, draw: Draw) -> Asked:
        """States, times and conditions of all rows, kind after kind."""
        cond = batch.cond[rows.order]
        t, s = self.times(rows, draw)
        x0 = self.clean(batch, cond, rows, draw)
        eps = draw.normal("eps", *x0.shape[1:])[rows.order]
        if self.config.null_drop and rows.near.start < rows.near.stop:
            drop = draw.choice("null", self.config.null_drop)[rows.order]
            drop[: rows.near.start] = False
            drop[rows.near.stop :] = False
            cond = self.student.dropped(cond, drop)
        return Asked(add_noise(x0, eps, t), eps - x0, t, s, cond)

    def times(self, rows: Dealt, draw: Draw) -> tuple[Tensor, Tensor]:
        """t and s [rows]; whole ways start where sampling does."""
        path = self.student.path
        t = within(path, self.config.time.drawn(draw.within("t"))[rows.order])
        t[rows.whole] = path.t_max
        return t, rcgm.second_time(self.config.group, t, draw.uniform("second")[rows.order])

    def sign(self, t: Tensor, rows: Dealt) -> Tensor | None:
        """-1 in the twin's rows, +1 elsewhere."""
        if not self.has_twin:
            return None
        sign = torch.ones_like(t)
        sign[rows.twin] = -1
        return sign

    def clean(self, batch: Batch, cond: Cond, rows: Dealt, draw: Draw) -> Tensor:
        """x0: real, and one-step outputs in the twin's rows; in all of them without data."""
        if self.config.guide == "base_datafree":
            return self.made(draw.normal("start", *self.student.row_shape)[rows.order], cond)
        x0 = batch.x0[rows.order]
        if not self.has_twin:
            return x0
        start = draw.normal("start", *x0.shape[1:])[rows.order][rows.twin]
        return torch.cat([x0[rows.path], self.made(start, cond[rows.twin])])

    @torch.no_grad()
    def made(self, noise: Tensor, cond: Cond) -> Tensor:
        """x^ = z - t_max V(z, t_max, 0), one step of the student as it is."""
        t = noise.new_full((len(noise),), self.student.path.t_max)
        return landing(self.student, self.student.path.start(noise), t, torch.zeros_like(t), cond)

    # ---- targets, none of which carries a graph

    @torch.no_grad()
    def target(self, asked: Asked, answer: Tensor, rows: Dealt, draw: Draw) -> Tensor:
        """V less its clamped residual, in the rows of the path."""
        if not len(asked.t):
            return answer
        return answer - rcgm.limited(self.residual(asked, answer, rows, draw), self.config.clamp)

    @torch.no_grad()
    def residual(self, asked: Asked, answer: Tensor, rows: Dealt, draw: Draw) -> Tensor:
        """What V is moved against in the rows of the path: the averaged network's roll-out, after a step along v."""
        v, order, step = self.velocity(asked, rows.between), self.config.order, self.config.derivative_step
        if order == 0:
            return answer - v
        top = torch.maximum(asked.t - step, asked.s)
        drawn = self.config.split == "random"
        fractions = [draw.uniform(f"split.{i}")[rows.order][rows.path] for i in range(order - 1)] if drawn else None
        with self.targeted():
            way = rcgm.roll_out(
                lambda x, t, s: average_velocity(self.student, x, t, s, asked.cond),
                asked.x - step * v,
                rcgm.split(top, asked.s, order, fractions),
            )
        return rcgm.residual(answer, way, v, asked.t, asked.s, step)

    def targeted(self) -> AbstractContextManager[None]:
        """Within the block the student computes with the target's weights."""
        return self.student.averaged() if self.config.averages else nullcontext()

    def velocity(self, asked: Asked, between: slice) -> Tensor:
        """v, guided in the rows below t_max: those that start from noise are guided by what they roll out with."""
        if not self.config.guides or between.start == between.stop:
            return asked.v
        part, (low, high) = asked.part(between), self.config.guidance_interval
        scale = torch.where((part.t > low) & (part.t < high), self.config.guidance_scale, 1.0)
        tied, free = self.tied_and_free(part)
        return torch.cat([asked.v[: between.start], rcgm.enhanced(part.v, tied, free, scale, self.config.guide)])

    def tied_and_free(self, asked: Asked) -> list[Tensor]:
        """Conditional and unconditional velocity at t, of the averaged student or of the base: that one at its own label."""
        network = self.student if self.config.guide == "self" else self.teacher
        cond = Cond.cat([asked.cond, network.null(asked.cond)])
        x, t = torch.cat([asked.x, asked.x]), torch.cat([asked.t, asked.t])
        if network is not self.student:
            return list(network.velocity(x, t, cond).chunk(2))
        with self.targeted():
            return list(average_velocity(network, x, t, t, cond).chunk(2))

    @torch.no_grad()
    def difference(self, x0: Tensor, cond: Cond, rows: Dealt, draw: Draw) -> Tensor:
        """G at noised one-step outputs: the twin's velocity less the real one, clamped."""
        noise = draw.normal("noise", *x0.shape[1:])[rows.order][rows.whole]
        u = within(self.student.path, self.config.rectification_time.drawn(draw.within("u"))[rows.order][rows.whole])
        x, minus = add_noise(x0, noise, u), -torch.ones_like(u)
        if self.config.real_velocity == "teacher":
            fake = average_velocity(self.student, x, u, u, cond, minus)
            real = guided(self.teacher, x, u, cond, self.config.guidance_scale, self.config.guidance_interval)
        else:
            x, u, both = torch.cat([x, x]), torch.cat([u, u]), Cond.cat([cond, cond])
            fake, real = average_velocity(self.student, x, u, u, both, torch.cat([minus, -minus])).chunk(2)
        return rcgm.limited(fake - real, self.config.clamp)

    # ---- sampling

    def pictures(self, rows: int, seed: int) -> Mapping[str, Tensor]:
        """What the twin believes the one-step outputs to be: its field from noise to data, in 20 steps."""
        if not self.has_twin:
            return {}
        role = self.student
        cond = self.preview_cond(rows).to(role.device)
        cond = cond.with_(sign=torch.full((rows,), -1.0, device=role.device))
        schedule = Schedule("ode", role.path.grid(TWIN_STEPS), target="same")
        draw = Draw.for_images(seed, np.arange(rows), device=role.device)
        with role.averaged():
            return {"negative time": role.decode(sample(role, schedule, cond, draw, role.row_shape))}


def within(path: Path, share: Tensor) -> Tensor:
    """Times at these shares of the range that the network knows."""
    return path.t_min + (path.t_max - path.t_min) * share
