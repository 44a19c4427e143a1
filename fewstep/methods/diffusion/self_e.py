"""Self-E (Yu et al., arXiv 2512.22374): an any-step model whose own flow branch scores where it lands, without a teacher.

    x_hat = G(x_t, t, s, c) = x_t - t V(x_t, t, s, c);   every row: L = w(t) |x_hat - sg[target]|^2
    s = t    target = x0, flow matching                                                          half of the rows
    s < t    x_s = (1 - s) sg[x_hat] + s n
             d = [G(x_s, s, s, null) - G(x_s, s, s, c)] + mu [F(x_s; s, t, c) - G(x_s, s, s, null)]
             target = |x0| z / |z|,  z = [x0 + lambda (x_hat - d)] / (1 + lambda),  lambda = t/(1-t) - s/(1-s)

The first bracket moves x_hat to where the condition is likelier; F, on from step `full_from`, learns what the student
makes from level t, and with mu = 1 turns d into the direction of distribution matching. The paper's body and code were
not read: its loss is known from accounts of it; the laws of t and s, w, the cap of lambda, F and the second time's
input are reconstructed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import UserError
from ...maths.average_velocity import landing
from ...maths.guidance import cfg, same_norm
from ...maths.laws import Law
from ...maths.losses import mse_rows
from ...maths.paths import add_noise, expand
from ...maths.scalars import Scalar, value
from ...roles import Role
from ..base import Event, Levels, Paper, Total, Update
from .any_step import AnyStepConfig, AnyStepMethod, Quarters, split_rows

if TYPE_CHECKING:
    from ...data.batch import Batch, Cond
    from ...draws import Draw
    from ...models.denoiser import Denoiser

TRAINED = {"ema": 0.9999, "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]}}
FAKE = {"optimizer": TRAINED["optimizer"]}
LOWEST = 0.02  # level at which the fake model is trained
NEAREST = 0.05  # t below which w is held, since 1 / t^2 has no bound


class SelfEConfig(AnyStepConfig):
    """Knobs of `SelfE`. Guidance is the usual scale, 1 = off."""

    terms: ClassVar[tuple[str, ...]] = ("data", "self", "fake")
    sampler: Literal["any", "multi"] = Field(default="any", description="of the exported model: any or multi")
    guidance_scale: float | None = Field(
        default=None, ge=0, description="of the exported model; null: 5, or 2 where the fake model takes part"
    )
    last: float = Field(
        default=0.5, ge=0, le=1, description="second time of a sample's last step, as a share of its t; 0 blurs"
    )
    time: Law = Field(default=Law(kind="logit_normal"), description="of t, on the clock")
    noise_share: float = Field(default=0.1, ge=0, le=1, description="of the rows that start from noise alone, t = 1")
    gap: Law = Field(default=Law(), description="of u in s = t (1 - p u)")
    reach: Scalar = Field(default=1.0, description="p; a ramp from 0 lets s leave t slowly")
    self_share: Quarters = Field(default=0.5, gt=0, lt=1, description="of the rows that have s < t")
    label_dropout: float = Field(default=0.1, ge=0, le=1, description="share of rows without condition, all with s = t")
    evaluator: Literal["online", "ema_cond", "teacher"] = Field(
        default="online", description="who scores: the student, its average where conditioned, or a frozen teacher"
    )
    eval_cfg: float = Field(default=1.0, ge=0, description="guidance of the scoring branch; 1 is the paper's")
    full_from: int | None = Field(
        default=None, ge=0, description="step from which the fake model takes part; null: never, 0: always"
    )
    fake_warmup: int = Field(default=0, ge=0, description="steps that the fake model trains before it takes part")
    fake_updates: int = Field(default=1, gt=0, description="steps of the fake model after each of the student")
    mu: float = Field(default=1.0, gt=0, description="share of the fake model's term; 1 is distribution matching")
    lambda_max: float = Field(default=10.0, gt=0, description="lambda's cap: small blurs, large drifts")
    norm_dims: Literal["sample", "channels", "none"] = Field(
        default="sample", description="over what the target keeps the norm of x0; none below some 64 elements"
    )
    weight: Literal["v", "x0"] = Field(default="v", description="w = 1 / max(t, .05)^2, or 1")

    @model_validator(mode="after")
    def _consistent(self) -> SelfEConfig:
        if self.fake_warmup > (self.full_from or 0):
            raise ValueError(f"fake_warmup={self.fake_warmup} would begin before the run: at most full_from")
        return self

    @property
    def sample_guidance(self) -> float:
        """The guidance of the exported model; the fake model's term trains some of it in."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        return 5.0 if self.full_from is None else 2.0


class Landed(NamedTuple):
    """Where rows have come to: data x0, the prediction x_hat (no graph) of a call at t told s [rows], its condition."""

    x0: Tensor
    x_hat: Tensor
    t: Tensor
    s: Tensor
    cond: Cond

    def rows(self, index: Tensor) -> Landed:
        """Some of the rows."""
        parts: Any = (part[index] for part in self)
        return Landed(*parts)


class SelfE(AnyStepMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`) and one network, new or a flow model."""

    name = "self_e"
    paper = Paper("Self-Evaluation Unlocks Any-Step Text-to-Image Generation", "arXiv:2512.22374")
    proven = "reconstruction"
    row_multiple = 4
    Config = SelfEConfig
    teacher: Denoiser
    fake_velocity: Denoiser

    def roles(self) -> tuple[Role, ...]:
        """The student; a teacher if one scores; the fake model if it ever takes part, whose second time is the student's t."""
        taught, faked = self.config.evaluator == "teacher", self.config.full_from is not None
        student = Role("student", "full", "teacher" if taught else None, defaults=TRAINED, adds=("s",))
        fake = Role("fake_velocity", "full", "student", defaults=FAKE, adds=("s",))
        return (*(Role("teacher"),) * taught, student, *(fake,) * faked)

    def bind(self, handles: Mapping[str, Any], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """Refuses adapters where they cannot play their part. Raises UserError."""
        super().bind(handles, sources, stores)
        if self.student.tune == "lora" and self.config.evaluator != "teacher":
            raise UserError(
                "student.tune: lora reads s from a shifted label, so at s = t it is not the flow network that could score "
                "it: write student.tune: full, or config.evaluator: teacher"
            )
        if self.config.full_from is not None and self.fake_velocity.tune != self.student.tune:
            raise UserError("fake_velocity starts as a copy of the student: give both the same tune")

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One regression on targets that the network has scored itself; then the fake model, when its time has come."""
        data, scored = split_rows(len(batch), self.config.self_share, draw.device)
        dropped = draw.choice("dropout", self.config.label_dropout)
        cond = self.student.dropped(batch.cond, dropped)
        t, s = self.times(scored, dropped, draw)
        eps, noise = (draw.normal(name, *batch.x0.shape[1:]) for name in ("eps", "renoise"))
        x_hat = landing(self.student, add_noise(batch.x0, eps, t), t, s, cond)
        landed = Landed(batch.x0, x_hat.detach(), t, s, cond).rows(scored)
        d = self.direction(landed, noise[scored], draw.step)
        target = batch.x0.index_copy(0, scored, self.target(landed, d))
        error = self.w(t) * mse_rows(x_hat, target)
        parts = {"data": data, "self": scored}
        yield Update(
            "student",
            {name: error[rows] * (len(rows) / len(error)) for name, rows in parts.items()},
            metrics=seen(landed, d),
            levels={name: Levels(error[rows], t[rows]) for name, rows in parts.items()},
        )
        for turn in range(self.config.fake_updates if self.fake_learns(draw.step) else 0):
            yield self.fake_update(landed, scored, draw.within(f"fake.{turn}"))

    # ---- the rows of a step

    def times(self, scored: Tensor, dropped: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """t and s [rows]; s = t outside of the rows `scored` and where the condition is dropped."""
        config, path = self.config, self.student.path
        t = path.time(config.time.drawn(draw.within("time")))
        t = torch.where(draw.choice("noise", config.noise_share), path.t_max, t)
        s = t * (1 - value(config.reach, draw.step) * config.gap.drawn(draw.within("gap")))
        s = torch.where(dropped, t, s.clamp_min(path.t_min))
        return t, t.index_copy(0, scored, s[scored])

    # ---- the target

    @torch.no_grad()
    def direction(self, landed: Landed, noise: Tensor, step: int) -> Tensor:
        """d [rows, ...]: what x_hat is moved against, found where it lands at level s with `noise`."""
        x, s, cond = add_noise(landed.x_hat, noise, landed.s), landed.s, landed.cond
        config, full = self.config, self.fake_acts(step)
        tied = self.scored(x, s, cond, averaged=config.evaluator == "ema_cond")
        if full and config.mu == 1 and config.eval_cfg == 1:  # the unconditional branch cancels
            return landing(self.fake_velocity, x, s, landed.t, cond) - tied
        free = self.scored(x, s, self.student.null(cond))
        d = free - cfg(free, tied, config.eval_cfg)
        return d + config.mu * (landing(self.fake_velocity, x, s, landed.t, cond) - free) if full else d

    def scored(self, x: Tensor, s: Tensor, cond: Cond, averaged: bool = False) -> Tensor:
        """G(x, s, s, cond) of the evaluator."""
        judge = self.teacher if self.config.evaluator == "teacher" else self.student
        with judge.averaged() if averaged else nullcontext():
            return landing(judge, x, s, s, cond)

    def target(self, landed: Landed, d: Tensor) -> Tensor:
        """|x0| z / |z| with z = [x0 + lambda (x_hat - d)] / (1 + lambda); exactly x0 where s = t."""
        weight = expand(noise_gap(landed.t, landed.s).clamp_max(self.config.lambda_max), d)
        z = (landed.x0 + weight * (landed.x_hat - d)) / (1 + weight)
        if self.config.norm_dims == "none":
            return z
        if self.config.norm_dims == "sample":
            return same_norm(z, landed.x0)
        z, like = (part.movedim(1, -1) for part in (z, landed.x0))
        return same_norm(z.flatten(0, -2), like.flatten(0, -2)).reshape(z.shape).movedim(-1, 1)

    def w(self, t: Tensor) -> Tensor:
        """1 / max(t, .05)^2, which makes an error of x0 one of the velocity; or 1."""
        return t.clamp_min(NEAREST) ** -2 if self.config.weight == "v" else torch.ones_like(t)

    # ---- the fake model

    def fake_acts(self, step: int) -> bool:
        """Whether the fake model takes part in d."""
        return self.config.full_from is not None and step >= self.config.full_from

    def fake_learns(self, step: int) -> bool:
        """Whether the fake model trains."""
        return self.fake_acts(step + self.config.fake_warmup)

    def on(self, event: Event) -> None:
        """Makes the fake model a copy of the student in the step before it learns."""
        if event.kind == "step_end" and self.fake_learns(event.step) and not self.fake_learns(event.step - 1):
            self.fake_velocity.assign(self.student)

    def fake_update(self, landed: Landed, scored: Tensor, draw: Draw) -> Update:
        """Flow matching on what the student has just made, told its t: half at the level s where d asks, half anywhere."""
        level = torch.where(draw.choice("half", 0.5)[scored], landed.s, draw.uniform("level", low=LOWEST)[scored])
        level = level.clamp(max(LOWEST, self.student.path.t_min), self.student.path.t_max)
        noise = draw.normal("noise", *landed.x_hat.shape[1:])[scored]
        told = landed.cond.with_(s=landed.t)
        return Update("fake_velocity", {"fake": self.fake_velocity.denoising_loss(landed.x_hat, noise, level, told)})

    # ---- sampling

    def sampling(self) -> dict[str, Any]:
        """Guidance that keeps the norm of the conditional prediction, and what the last step is told."""
        guidance = self.config.sample_guidance
        last = self.config.last if self.config.sampler == "any" else 0.0
        return {"guidance": guidance, "rescale": None if guidance == 1 else "energy", "last": last}


def noise_gap(t: Tensor, s: Tensor) -> Tensor:
    """lambda = t / (1 - t) - s / (1 - s) [rows], in float32 or wider and held below a million."""
    t, s = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (t, s))
    return t / (1 - t).clamp_min(1e-6) - s / (1 - s).clamp_min(1e-6)


def seen(landed: Landed, d: Tensor) -> dict[str, Tensor]:
    """|d| / |x_hat|, the std of x_hat, and the cosine of d and x0 - x_hat, row by row: the loss itself tells nothing."""
    x_hat, move, left = (part.flatten(1) for part in (landed.x_hat, d, landed.x0 - landed.x_hat))
    return {
        "direction": move.norm(dim=1) / x_hat.norm(dim=1).clamp_min(1e-6),
        "x_hat_std": x_hat.std(1, correction=0),
        "agreement": F.cosine_similarity(move, left, dim=1),
    }
