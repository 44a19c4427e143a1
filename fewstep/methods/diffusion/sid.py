"""Score identity distillation of images (Zhou et al., arXiv 2404.04057; guided: SiD-LSG, arXiv 2406.01561; with real
samples: SiDA, arXiv 2410.14919).

A few-step generator makes x_g; a fake model denoises what it makes. With x_t = (1 - t) x_g + t eps, kept in the graph,

    y_r = x0_teacher(x_t, t, c),   y_f = x0_fake(x_t, t, c),   d = y_r - y_f
    L_G = mean d [ (y_r - x_g) - alpha d ] / W,   W = sg[ mean |x_g - y_r| ]

Gradients run *through* both frozen networks into x_g. Where the fake model is the best denoiser of x_g, L_G has the value
(1 - alpha) E|d|^2: zero at alpha = 1 and negative above, so it measures no progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...data.batch import Cond
from ...errors import UserError
from ...maths.guidance import guided, guided_x0
from ...maths.losses import discriminator_rows, generator_rows
from ...maths.paths import FlowPath, Path, add_noise
from ...maths.scalars import Scalar
from ...maths.solvers import Schedule, rollout
from ...roles import Handle, Role
from ..base import DiffusionMethod, Event, MethodConfig, Paper, Total, Update

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw
    from ...models.denoiser import Denoiser
    from ...store import Store

FLOOR = 1e-5  # of W, in units of the data
DECADES = 2.0  # the log-uniform law spans t = 1 .. 10^-2


class SiDConfig(MethodConfig):
    """Knobs of `SiD`. `weights`: sid, gan for the student; denoise, discriminator for the fake model.

    Guidance scales are the usual ones (1 = off): SiD-LSG's kappa_1 is `fake_train_guidance`, kappa_2 = kappa_3
    `fake_guidance`, kappa_4 `guidance_scale`.
    """

    default_weights: ClassVar[Mapping[str, Scalar]] = {"sid": 100.0, "gan": 0.01, "discriminator": 1.0}
    terms: ClassVar[tuple[str, ...]] = ("sid", "gan", "denoise", "discriminator")
    steps: int | tuple[int, ...] = Field(default=1, description="calls a sample; a list: one is drawn at each step")
    start: float | None = Field(
        default=None, gt=0, lt=1, description="clock of the first level, whose input has no signal; null: pure noise"
    )
    loss: Literal["sid", "diff_instruct", "dmd_norm"] = "sid"
    alpha: float = Field(default=1.0, ge=0, description="1 is safe from the start; 1.2 late in training")
    weight: Literal["mean", "snr", "none"] = Field(default="mean", description="what W is")
    noise: Literal["log_uniform", "uniform"] = Field(default="uniform", description="law of t in L_G")
    levels: tuple[float, float] = Field(default=(0.02, 0.98), description="range of t in both losses, on the clock")
    guidance_scale: float = Field(default=1.0, ge=0, description="of the teacher in L_G")
    fake_guidance: float = Field(default=1.0, ge=0, description="of the fake model in L_G")
    fake_train_guidance: float = Field(default=1.0, ge=0, description="of the fake model in its own loss")
    fake_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of its rows trained without condition")
    fake_updates: int = Field(default=1, gt=0, description="steps of the fake model for each step of the student")
    fake_reset: int | None = Field(
        default=None, gt=0, description="samples after which it starts from the teacher again"
    )
    adversarial: bool = Field(default=False, description="SiDA: the fake model's encoder also tells real from made")
    features: tuple[str, ...] | None = Field(
        default=None, description="submodules it reads; null: the family's deepest"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SiDConfig:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"steps={self.steps} must be one or more numbers of at least 1")
        if not 0 < self.levels[0] < self.levels[1] <= 1:
            raise ValueError(f"levels={self.levels} must increase within (0, 1]")
        unconditional = self.fake_guidance != 1 or self.fake_train_guidance != 1
        if unconditional and not self.fake_dropout:
            raise ValueError("a guided fake model needs its unconditional branch trained: set fake_dropout, e.g. 0.1")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """`steps` as a tuple."""
        return (self.steps,) if isinstance(self.steps, int) else self.steps


def sid_terms(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """d [(y_r - x) - alpha d] an element, with d = y_r - y_f; equal to (1 - alpha) d^2 + d (y_f - x)."""
    d = real - fake
    return d * ((real - x) - alpha * d)


def direction_terms(x: Tensor, real: Tensor, fake: Tensor, _alpha: float) -> Tensor:
    """-sg[d] x an element: the gradient of Diff-Instruct (arXiv 2305.18455) and DMD, blind to both networks' slopes."""
    return -(real - fake).detach() * x


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "sid": sid_terms,
    "diff_instruct": direction_terms,
    "dmd_norm": direction_terms,
}


class SiD(DiffusionMethod):
    """Needs conditions alone (`batch.cond`); with `adversarial` also samples (`batch.x0`)."""

    name = "sid"
    paper = Paper("Score identity Distillation", "arXiv:2404.04057")
    proven = "measured"
    Config: ClassVar[type[SiDConfig]] = SiDConfig
    teacher: Denoiser
    student: Denoiser
    fake_score: Denoiser

    def roles(self) -> tuple[Role, ...]:
        """Teacher, student and fake model; two adapters on one base by default."""
        trained = {"optimizer": {"lr": 1e-5, "betas": (0.0, 0.999)}}
        student = Role("student", "lora", "teacher", defaults={**trained, "ema": 0.999})
        return (Role("teacher"), student, Role("fake_score", "lora", "teacher", defaults=trained))

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Store]) -> None:
        """As in `DiffusionMethod`; with `start` the student's path ends there. UserError on a DDPM table."""
        super().bind(handles, sources, stores)
        if self.config.start is None:
            return
        path = self.teacher.path
        if not isinstance(path, FlowPath):
            raise UserError("config.start needs a flow teacher: schedulers of DDPM tables begin at their last entry")
        begun = replace(path, t_max=path.time(self.config.start), zero_signal=True)
        self.student.path = self.student.handle.path = begun

    @property
    def path(self) -> Path:
        """The student's path."""
        return self.student.path

    def schedule(self) -> Schedule:
        """The longest of the trained grids: denoise and noise again."""
        return self.schedule_for(max(self.config.sizes))

    def schedule_for(self, steps: int) -> Schedule:
        """The grid of `steps` levels."""
        return Schedule("renoise", self.path.grid(steps))

    def steps_offered(self) -> tuple[int, ...]:
        """All trained grids."""
        return tuple(sorted(self.config.sizes))

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """A step of the fake model, and after every `fake_updates` of them one of the student, on fresh samples."""
        yield self.fake_update(batch, draw.within("fake"))
        if (draw.step + 1) % self.config.fake_updates == 0:
            yield self.student_update(batch, draw.within("student"))

    def generate(self, cond: Cond, draw: Draw, graph: bool) -> Tensor:
        """x_g [rows, ...]: the student's clean prediction at a random level of a random grid; earlier levels no graph."""
        sizes = self.config.sizes
        grid = self.schedule_for(sizes[draw.integers("grid", len(sizes), per="step")])
        level = draw.integers("level", grid.steps, per="step")
        x, u = rollout(self.student, grid, cond, draw, self.student.shape(cond), until=level)
        with torch.set_grad_enabled(graph):
            return self.student.x0(x, x.new_full((len(x),), self.path.time(u)), cond)

    def fake_update(self, batch: Batch, draw: Draw) -> Update:
        """The fake model denoises x_g in its own parameterisation, and with SiDA tells it from real samples."""
        x0, cond = self.generate(batch.cond, draw, graph=False), self.dropped(batch.cond, draw)
        t = self.fake_level(draw)
        eps = draw.normal("eps", *x0.shape[1:])
        losses = {"denoise": self.denoising(x0, eps, t, cond)}
        if self.config.adversarial:  # real and made share level and noise
            real, made = (self.logits(add_noise(x, eps, t), t, batch.cond) for x in (batch.x0, x0))
            losses["discriminator"] = 0.5 * discriminator_rows(real, made)
        return Update("fake_score", losses)

    def fake_level(self, draw: Draw) -> Tensor:
        """Flow times [rows] at which the fake model is trained."""
        low, high = self.config.levels
        return self.teacher.path.time(draw.uniform("u", low=low, high=high))

    def denoising(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The fake model's loss; guided (long guidance) it is the guided output that has to be right."""
        if self.config.fake_train_guidance == 1:
            return self.fake_score.denoising_loss(x0, eps, t, cond)
        x = add_noise(x0, eps, t)
        output = guided(self.fake_score, x, t, cond, self.config.fake_train_guidance, what="output")
        return self.mean_rows((output - self.fake_score.path.target(x0, eps, t)) ** 2, cond)

    def dropped(self, cond: Cond, draw: Draw) -> Cond:
        """`cond` with a share of the rows made unconditional, so that the fake model can be guided."""
        share = self.config.fake_dropout
        return self.fake_score.dropped(cond, draw.choice("dropout", share)) if share else cond

    def student_update(self, batch: Batch, draw: Draw) -> Update:
        """L_G, and with SiDA the generator's adversarial loss from the same call of the fake model."""
        x0, cond = self.generate(batch.cond, draw, graph=True), batch.cond
        t = self.level(draw)
        x = add_noise(x0, draw.normal("eps", *x0.shape[1:]), t)
        with torch.set_grad_enabled(self.config.loss == "sid"):
            real = guided_x0(self.teacher, x, t, cond, self.config.guidance_scale)
            fake = guided_x0(self.fake_score, x, t, cond, self.config.fake_guidance)
        weight = self.normaliser(x0, real, t, cond)
        terms = LOSSES[self.config.loss](x0, real, fake, self.config.alpha)
        losses = {"sid": self.mean_rows(terms, cond) / weight}
        if self.config.adversarial:
            losses["gan"] = generator_rows(self.logits(x, t, cond)) / weight
        metrics = {
            "x0_std": x0.detach().flatten(1).std(1, correction=0),
            "gap": self.mean_rows((real - fake) ** 2, cond).detach(),
        }
        return Update("student", losses, metrics=metrics)

    def mean_rows(self, terms: Tensor, cond: Cond) -> Tensor:
        """Mean [rows] over what belongs to a sample, which padding does not."""
        return self.student.family.mean_rows(terms, cond)

    def level(self, draw: Draw) -> Tensor:
        """Flow times [rows] at which the two models are compared; log-uniform: t = 10^(-2 u), so as many as decades."""
        (low, high), path = self.config.levels, self.teacher.path
        if self.config.noise == "uniform":
            return path.time(draw.uniform("u", low=low, high=high))
        t = torch.pow(10.0, -DECADES * draw.uniform("u"))
        return t.clamp(max(low, path.t_min), min(high, path.t_max))

    def normaliser(self, x0: Tensor, real: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """W [rows], detached: how far the teacher's prediction is from x_g; or t^2 / (1 - t)^2, the inverse SNR; or 1."""
        if self.config.weight == "mean" or self.config.loss == "dmd_norm":
            return self.mean_rows((x0 - real).abs(), cond).detach().clamp_min(FLOOR)
        return (t / (1 - t)) ** 2 if self.config.weight == "snr" else torch.ones_like(t)

    def logits(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """[rows, ...]: activations of the fake model averaged over channels, within +-10; no parameters of its own."""
        features = self.fake_score.features(x, t, cond, self.config.features)
        return torch.cat([feature.mean(1).flatten(1).clamp(-10, 10) for feature in features], 1)

    def on(self, event: Event) -> None:
        """Starts the fake model from the teacher again when it has seen `fake_reset` samples."""
        if self.config.fake_reset is None or event.kind != "step_end":
            return
        before, now = ((event.step - done) * event.rows // self.config.fake_reset for done in (1, 0))
        if now > before:
            self.fake_score.restart(self.teacher)
            self.student.rewind()
