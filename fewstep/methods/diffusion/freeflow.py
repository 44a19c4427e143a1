"""FreeFlow (Tong et al., arXiv 2511.19428): a one-step flow map learned from its teacher and the prior, without data.

The student V(z, delta, c, g) is the mean velocity from noise z down to t_max - delta, f(z, delta) = z - delta V; the
network that a sample needs is V at delta = t_max. Two directions move it, both found without gradient (the paper's
signs are opposite, since its velocities point to the data):

    D_G = V + delta dV/d delta - v_g(f(z, delta), t_max - delta)     prediction: the map's own velocity is the teacher's
    D_N = v_fake(x_r, r) - v_g(x_r, r),  x_r = (1 - r) f(z, t_max) + r n     correction: of what has piled up at the end
    L   = V . sg[w D_G] on one share of the rows, lambda V . sg[D_N] on the rest (there delta = t_max)

with w = 1 / (mean D_G^2 + e)^k and lambda the ratio of the mean lengths. v_fake learns the velocity of what the student
makes, as it changes. v_g is the teacher guided by g, which is fixed, or drawn for each row and told to the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...data.batch import Cond
from ...errors import UserError
from ...maths.derivative import How, derivative
from ...maths.flow_maps import flow_map, map_velocity
from ...maths.guidance import guided
from ...maths.laws import Law
from ...maths.losses import pull, rows_mean
from ...maths.paths import add_noise, expand
from ...maths.solvers import Schedule
from ...nets.extra_inputs import folded
from ...roles import Role, merged
from ..base import DiffusionMethod, MethodConfig, Paper, Total, Update

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw
    from ...models.denoiser import Denoiser

TRAINED = {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]}}
TINY = 1e-3  # e of the weight and of lambda; and the lowest time at which the teacher is asked
Interval = tuple[float, float]


class FreeFlowConfig(MethodConfig):
    """Knobs of `FreeFlow`. `weights`: prediction, correction, denoise. Guidance is the usual scale, 1 = off."""

    terms: ClassVar[tuple[str, ...]] = ("prediction", "correction", "denoise")
    mode: Literal["joint", "pred", "corr"] = "joint"
    segments: int = Field(default=1, gt=0, description="steps of a sample; each starts where the one before ends")
    guidance_scale: float | Interval = Field(
        default=(1.0, 3.0), description="of the teacher: a number, or the range that each row draws from and tells"
    )
    sample_guidance: float | None = Field(default=None, description="the exported model's; null: mid-range")
    prediction_interval: Interval = Field(default=(0.0, 1.0), description="times t at which prediction is guided")
    correction_interval: Interval = Field(default=(0.0, 0.7), description="times r at which correction is guided")
    prediction_share: float = Field(default=0.75, gt=0, lt=1, description="of the rows, when both terms train")
    weight_power: float = Field(default=1.0, ge=0, description="k of w = 1 / (mean D_G^2 + e)^k")
    balance: Literal["after", "before", "fixed"] = Field(
        default="after", description="lambda from |D_G| after or before it is weighted; fixed: alpha itself"
    )
    alpha: float = Field(default=1.0, gt=0, description="factor of lambda; .3 to 3")
    derivative: How = Field(default="jvp", description="how dV/d delta is found; central where jvp is not implemented")
    derivative_step: float | None = Field(
        default=None, gt=0, description="h; null: .005, or .05 when computing in bf16"
    )
    delta: Law = Law()
    level: Law = Field(default=Law(kind="logit_normal", loc=0.8), description="r of the correction; has to reach 1")
    fake_level: Law = Field(default=Law(kind="mix", loc=0.8), description="r at which the fake model is trained")
    level_range: Interval = Field(default=(1e-3, 0.999), description="r is clamped to it")
    fake_updates: int = Field(default=1, gt=0, description="steps of the fake model after each of the student")
    warmup: int = Field(default=0, ge=0, description="steps with the prediction alone, while the fake model learns")

    @model_validator(mode="after")
    def _consistent(self) -> FreeFlowConfig:
        ranges = ("guidance_scale", "prediction_interval", "correction_interval", "level_range")
        for name in ranges:
            value = getattr(self, name)
            if isinstance(value, tuple) and not 0 <= value[0] < value[1]:
                raise ValueError(f"{name}={list(value)} must increase, from 0 or more")
        if isinstance(self.guidance_scale, float) and self.sample_guidance not in (None, self.guidance_scale):
            raise ValueError("sample_guidance goes with a range in guidance_scale: a fixed guidance is baked in")
        return self

    @property
    def told(self) -> bool:
        """Whether guidance varies and is an input of student and fake model."""
        return isinstance(self.guidance_scale, tuple)

    @property
    def fed_guidance(self) -> float:
        """The guidance of the exported model."""
        scale = self.guidance_scale
        if not isinstance(scale, tuple):
            return scale
        return sum(scale) / 2 if self.sample_guidance is None else self.sample_guidance


class Asked(NamedTuple):
    """What a step asks, row by row: where the map starts (at time `top`) and how far it goes; guidance; r and n."""

    top: float
    start: Tensor
    delta: Tensor
    cond: Cond
    guidance: Tensor | float
    level: Tensor
    noise: Tensor

    def rows(self, index: Tensor) -> Asked:
        """Some of the rows."""
        parts: Any = (part if isinstance(part, float) else part[index] for part in self)
        return Asked(*parts)


class Directions(NamedTuple):
    """By term: what V is moved against, and the lengths [rows] that lambda compares; the samples that were corrected."""

    moves: dict[str, Tensor]
    lengths: dict[str, Tensor]
    made: Tensor | None


class FreeFlow(DiffusionMethod):
    """Needs conditions alone (`batch.cond`): labels or prompts."""

    name = "freeflow"
    paper = Paper("Flow Map Distillation Without Data", "arXiv:2511.19428")
    proven = "measured"
    row_multiple = 4  # then three rows in four are the same ones however the batch is cut
    Config = FreeFlowConfig
    teacher: Denoiser
    student: Denoiser
    fake_velocity: Denoiser

    def roles(self) -> tuple[Role, ...]:
        """Teacher; the student, a full copy that learns to read delta; the fake model, an adapter unless it is told g."""
        guidance = ("guidance",) if self.config.told else ()
        student = Role("student", "full", "teacher", defaults={**TRAINED, "ema": 0.9999}, adds=("delta", *guidance))
        tune: Literal["full", "lora"] = "full" if self.config.told else "lora"
        fake = Role("fake_velocity", tune, "teacher", defaults=TRAINED, adds=guidance)
        return (Role("teacher"), student) if self.config.mode == "pred" else (Role("teacher"), student, fake)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """Both directions, without gradient; the student's step along them; the fake model's steps on what it made."""
        segment = self.segment(draw)
        parts = self.parts(len(batch), draw.device, segment)
        asked = self.asked(batch.cond, parts, segment, draw)
        found = self.directions(asked, parts)
        balance: Tensor | float = self.config.alpha
        if len(parts) == 2 and self.config.balance != "fixed":
            n: Any = yield Total({name: _sum_and_count(rows) for name, rows in found.lengths.items()})
            means = {name: total / count for name, (total, count) in n.items()}
            balance = self.config.alpha * means["prediction"] / (means["correction"] + TINY)
        yield self.student_update(asked, parts, found, balance if draw.step >= self.config.warmup else 0.0)
        if found.made is not None:
            for turn in range(self.config.fake_updates):
                yield self.fake_update(found.made, asked.rows(parts["correction"]), parts, draw.within(f"fake.{turn}"))

    # ---- the rows of a step

    def segment(self, draw: Draw) -> int:
        """Which segment a step trains, counted from noise; the correction knows the last one only."""
        count = self.config.segments
        return count - 1 if count == 1 or self.config.mode == "corr" else draw.integers("segment", count, per="step")

    @property
    def edges(self) -> list[float]:
        """Times at which segments start, and 0."""
        path = self.student.path
        return [path.time(u) for u in path.grid(self.config.segments)] + [0.0]

    def parts(self, rows: int, device: torch.device, segment: int) -> dict[str, Tensor]:
        """Which rows serve which term: three in four predict, every fourth corrects (in the segment that ends at 0)."""
        share = {"joint": self.config.prediction_share, "pred": 1.0, "corr": 0.0}[self.config.mode]
        share = share if segment == self.config.segments - 1 else 1.0
        corrects = [int((i + 1) * (1 - share) + 1e-9) > int(i * (1 - share) + 1e-9) for i in range(rows)]
        index = {
            "prediction": [i for i, yes in enumerate(corrects) if not yes],
            "correction": [i for i, yes in enumerate(corrects) if yes],
        }
        return {name: torch.tensor(chosen, device=device) for name, chosen in index.items() if chosen}

    def asked(self, cond: Cond, parts: Mapping[str, Tensor], segment: int, draw: Draw) -> Asked:
        """Starts, durations, guidance and levels of a step; rows that correct go all the way."""
        scale, edges = self.config.guidance_scale, self.edges
        guidance = draw.uniform("guidance", low=scale[0], high=scale[1]) if isinstance(scale, tuple) else float(scale)
        start = self.start(self.told(cond, guidance), edges[: segment + 1], draw)
        width = edges[segment] - edges[segment + 1]
        delta = width * self.config.delta.drawn(draw.within("delta"))
        if "correction" in parts:
            delta = delta.index_fill(0, parts["correction"], width)
        level = self.levels(self.config.level, draw.within("level"))
        return Asked(edges[segment], start, delta, cond, guidance, level, draw.normal("noise", *self.student.row_shape))

    @torch.no_grad()
    def start(self, cond: Cond, edges: list[float], draw: Draw) -> Tensor:
        """Noise at the first edge, carried by the student to the last one."""
        x = self.student.path.start(draw.normal("start", *self.student.row_shape))
        for top, end in pairwise(edges):
            x = flow_map(self.student, x, x.new_full((len(x),), top - end), cond, top)
        return x

    def levels(self, law: Law, draw: Draw) -> Tensor:
        """r [rows] by `law`, clamped, and to where the teacher was trained."""
        (low, high), path = self.config.level_range, self.teacher.path
        return law.drawn(draw).clamp(max(low, path.t_min), min(high, path.t_max))

    def told(self, cond: Cond, guidance: Tensor | float) -> Cond:
        """The condition with the guidance, for networks that are told it."""
        return cond.with_(guidance=guidance) if isinstance(guidance, Tensor) else cond

    # ---- the directions

    def directions(self, asked: Asked, parts: Mapping[str, Tensor]) -> Directions:
        """Both terms, as far as they are on."""
        moves, lengths, made = {}, {}, None
        if "prediction" in parts:
            residual, weight = self.prediction(asked.rows(parts["prediction"]))
            moves["prediction"] = expand(weight, residual) * residual
            lengths["prediction"] = _norms(residual if self.config.balance == "before" else moves["prediction"])
        if "correction" in parts:
            moves["correction"], made = self.correction(asked.rows(parts["correction"]))
            lengths["correction"] = _norms(moves["correction"])
        return Directions(moves, lengths, made)

    @torch.no_grad()
    def prediction(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """D_G = V + delta dV/d delta - v_g(f(z, delta), t_max - delta) (the paper's eq. 9), and its weight w [rows]."""
        cond, delta = self.told(asked.cond, asked.guidance), asked.delta
        v, slope = derivative(
            lambda s: map_velocity(self.student, asked.start, s, cond, asked.top),
            delta,
            self.config.derivative,
            self.config.derivative_step or (5e-3 if self.student.autocast is None else 5e-2),
            high=asked.top,
        )
        delta = expand(delta, v)
        t = (asked.top - asked.delta).clamp_min(max(TINY, self.teacher.path.t_min))
        residual = v + delta * slope - self.guided(asked.start - delta * v, t, asked, self.config.prediction_interval)
        return residual, (rows_mean(residual**2) + TINY) ** -self.config.weight_power

    @torch.no_grad()
    def correction(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """D_N = v_fake(x_r, r) - v_g(x_r, r) (the paper's eq. 11), and the samples f(z, t_max) that it was found at."""
        cond = self.told(asked.cond, asked.guidance)
        x0 = flow_map(self.student, asked.start, asked.delta, cond, asked.top)
        x = add_noise(x0, asked.noise, asked.level)
        seen = self.fake_velocity.velocity(x, asked.level, cond)
        return seen - self.guided(x, asked.level, asked, self.config.correction_interval), x0

    def guided(self, x: Tensor, t: Tensor, asked: Asked, interval: Interval) -> Tensor:
        """v_g: the teacher's velocity, guided where t lies within `interval`."""
        return guided(self.teacher, x, t, asked.cond, asked.guidance, interval)

    # ---- the steps

    def student_update(
        self, asked: Asked, parts: Mapping[str, Tensor], found: Directions, balance: Tensor | float
    ) -> Update:
        """One call with gradient for all rows; each term counts by its share of them."""
        v = map_velocity(self.student, asked.start, asked.delta, self.told(asked.cond, asked.guidance), asked.top)
        factor = {"prediction": 1.0, "correction": balance}
        losses = {
            name: pull(v[rows], -factor[name] * found.moves[name]) * (len(rows) / len(v))
            for name, rows in parts.items()
        }
        metrics = {}
        if found.made is not None:
            metrics["x0_std"] = found.made.flatten(1).std(1, correction=0)
            # looked at ahead of all that follows from it: when the fake model breaks, a report names this number
            metrics["fake_velocity_gap"] = _norms(found.moves["correction"])
            metrics["balance"] = torch.as_tensor(balance)
        return Update("student", losses, metrics=metrics)

    def fake_update(self, x0: Tensor, made_from: Asked, parts: Mapping[str, Tensor], draw: Draw) -> Update:
        """Flow matching on what the student has just made, x0 [rows, ...], unguided."""
        rows = parts["correction"]
        level = self.levels(self.config.fake_level, draw.within("level"))[rows]
        eps = draw.normal("noise", *x0.shape[1:])[rows]
        cond = self.told(made_from.cond, made_from.guidance)
        return Update("fake_velocity", {"denoise": self.fake_velocity.denoising_loss(x0, eps, level, cond)})

    # ---- sampling

    def schedule(self) -> Schedule:
        """Euler steps, one a segment: with delta fixed at its width, the student is a flow network that needs no more.

        UserError when the widths differ, since the exported network has one delta for good.
        """
        widths = [top - end for top, end in pairwise(self.edges)]
        if max(widths) - min(widths) > 1e-6:
            raise UserError("config.segments above 1 needs a flow path without shift, where all steps are equally wide")
        return Schedule("ode", self.student.path.grid(self.config.segments))

    def preview_cond(self, rows: int) -> Cond:
        """Conditions of the first samples, with the duration and the guidance that the exported network has for good."""
        cond = super().preview_cond(rows)
        fed = {name: torch.full((rows,), value) for name, value in self.constants().items()}
        return cond.with_(**fed)

    def constants(self) -> dict[str, float]:
        """The extra inputs' values in the exported network."""
        guidance = {"guidance": self.config.fed_guidance} if self.config.told else {}
        return {"delta": self.edges[0] - self.edges[1], **guidance}

    def exported_module(self) -> nn.Module:
        """The averaged student with its extra inputs folded away: a network of the teacher's own class."""
        return folded(merged(self.student), self.constants())  # type: ignore[arg-type]


def _sum_and_count(rows: Tensor) -> Tensor:
    """[2], which adds up over parts and ranks."""
    return torch.stack([rows.sum(), rows.new_tensor(len(rows))])


def _norms(direction: Tensor) -> Tensor:
    """The length of each row."""
    return direction.flatten(1).norm(dim=1)
