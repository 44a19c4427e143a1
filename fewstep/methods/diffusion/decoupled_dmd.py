"""Decoupled DMD (Liu et al., arXiv 2511.22677), with DMD2 (arXiv 2405.14867) as `schedule: coupled`.

A few-step generator G is pulled along two directions, each seen from its own noising of x^ = G(x_t, t, c):

    D_DM = x0_teacher(x_DM, tau_DM, c) - x0_fake(x_DM, tau_DM, c)                         distribution matching
    D_CA = (alpha - 1) [x0_teacher(x_CA, tau_CA, c) - x0_teacher(x_CA, tau_CA, null)]     guidance augmentation
    L_G  = 0.5 |x^ - sg[x^ + D_DM / m_DM + D_CA / m_CA]|^2

where x_tau = (1 - tau) sg[x^] + tau n, and alpha is the usual guidance scale (1 = off). The fake model is a denoiser of
what G makes, trained between generator steps and never guided. Guidance augments only what is cleaner than the
generator's own input, tau_CA < t: written in this convention, where t = 1 is noise (the paper counts the other way).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ...data.batch import Cond
from ...errors import UserError
from ...maths.losses import cosine_rows, discriminator_rows, generator_rows, l1_rows, mean_variance_rows, mse_rows, pull
from ...maths.paths import VPPath, add_noise, expand
from ...maths.scalars import Scalar
from ...maths.solvers import Schedule, rollout
from ...nets.discriminator import Discriminator
from ...roles import Handle, Role
from ..base import DiffusionMethod, Event, MethodConfig, Paper, Total, Update

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw
    from ...models.denoiser import Denoiser

CAPPED = {"coupled": (), "full": (), "constrained": ("dm", "ca"), "hybrid": ("ca",)}  # branches that stay below t
SPACES: Mapping[str, Callable[[Tensor], Tensor]] = {  # D in another space is D in x0 times this
    "x0": torch.ones_like,
    "v": lambda t: 1 / t,
    "score": lambda t: (1 - t) / t**2,
}
TRAINED = {"optimizer": {"lr": 5e-5, "weight_decay": 0.01, "clip": 10.0}}
MEASURED_ROWS = 4096


class Moments(BaseModel):
    """Mean and variance of the elements of one sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float
    var: float = Field(gt=0)


class DecoupledDMDConfig(MethodConfig):
    """Knobs of `DecoupledDMD`. `weights`: dm, ca, meanvar, gan for the student; denoise, discriminator, r1 for critics.

    meanvar and r1 are on when a weight is given: 0.01-0.05 and 100-1000 are usual.
    """

    default_weights: ClassVar[Mapping[str, Scalar]] = {"gan": 5e-3, "discriminator": 1e-2}
    terms: ClassVar[tuple[str, ...]] = ("dm", "ca", "meanvar", "gan", "denoise", "discriminator", "r1")
    steps: int | tuple[int, ...] = Field(default=4, description="calls a sample; a list: one is drawn at each step")
    sampler: Literal["ode", "renoise"] = "ode"
    guidance_scale: float = Field(default=4.0, ge=0, description="alpha, the usual scale baked in; 1 = off")
    schedule: Literal["coupled", "full", "constrained", "hybrid"] = "hybrid"
    ca_cap: float = Field(default=1.0, gt=0, le=1, description="tau_CA stays below this share of the input level")
    normaliser: Literal["none", "dmd2", "per_branch"] = "per_branch"
    norm_min: float = Field(default=0.1, gt=0, description="smallest normaliser, in units of the data")
    space: Literal["x0", "v", "score"] = "x0"
    regulariser: Literal["dm", "none", "meanvar", "gan", "dm+gan"] = "dm"
    moments: Moments | Literal["data"] = Field(default="data", description="what meanvar aims at; data: measured")
    fake_updates: int = Field(default=5, gt=0, description="critic steps between two generator steps")
    fake_pull: float | None = Field(default=None, ge=0, le=1, description="share of itself that the fake keeps")
    fake_per_level: bool = Field(default=False, description="a fake model for each level; levels then come in turn")
    dynamic_grid: int | None = Field(default=None, gt=0, description="draw 1..this many random levels at each step")
    levels: tuple[float, float] = Field(default=(0.02, 0.98), description="range of tau_DM and tau_CA")
    gan_features: Literal["fake_score", "teacher"] = Field(default="fake_score", description="what the heads read")
    gan_layers: tuple[str, ...] | None = Field(default=None, description="submodules; null: the family's deepest")

    @model_validator(mode="after")
    def _consistent(self) -> DecoupledDMDConfig:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"steps={self.steps} must be one or more numbers of at least 1")
        if not 0 < self.levels[0] < self.levels[1] <= 1:
            raise ValueError(f"levels={self.levels} must increase within (0, 1]")
        if self.fake_per_level and self.dynamic_grid is not None:
            raise ValueError("fake_per_level needs fixed levels: remove dynamic_grid")
        if self.guidance_scale == 1 and self.regulariser == "none":
            raise ValueError("guidance_scale 1 with regulariser none leaves nothing to train on")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """`steps` as a tuple."""
        return (self.steps,) if isinstance(self.steps, int) else self.steps

    @property
    def turns(self) -> list[tuple[int, int]]:
        """(steps, level) of every call on the configured grids."""
        return [(n, level) for n in self.sizes for level in range(n)]

    def regularised_by(self, term: str) -> bool:
        """Whether the generator has this term besides `ca`."""
        return term in self.regulariser.split("+") or (term == "meanvar" and "meanvar" in self.weights)


class Point(NamedTuple):
    """x^ noised to level t [rows]: where two predictions are compared."""

    x: Tensor
    t: Tensor


class DecoupledDMD(DiffusionMethod):
    """Needs conditions alone (`batch.cond`); with a discriminator also samples (`batch.x0`)."""

    name = "decoupled_dmd"
    paper = Paper(
        "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield", "arXiv:2511.22677"
    )
    proven = "measured"
    Config = DecoupledDMDConfig
    teacher: Denoiser
    student: Denoiser
    fake_score: Denoiser
    discriminator: Handle

    def roles(self) -> tuple[Role, ...]:
        """Teacher, student and the critics that the regulariser asks for; two adapters on one base by default."""
        named = {"student": Role("student", "lora", "teacher", defaults=TRAINED)}
        for name in self.fakes:  # all are what the recipe says of fake_score
            named[name] = Role(name, "lora", "teacher", defaults=TRAINED, like="fake_score")
        named["discriminator"] = Role("discriminator", "full", build=self._head, defaults=TRAINED)
        return (Role("teacher"), named["student"], *(named[name] for name in self.critics))

    @property
    def critics(self) -> tuple[str, ...]:
        """The roles that learn from what the student makes."""
        gan, eyes = self.config.regularised_by("gan"), self.config.gan_features
        fake = self.config.regularised_by("dm") or (gan and eyes == "fake_score")
        return self.fakes * fake + ("discriminator",) * gan

    @property
    def judged(self) -> bool:
        """Whether the discriminator plays along in this stage."""
        return self.config.regularised_by("gan")

    @property
    def fakes(self) -> tuple[str, ...]:
        """One fake model, or one for each distinct level: a shared one makes only the mixture over levels match."""
        return (
            tuple(f"fake_score_{i}" for i in range(len(self.shares))) if self.config.fake_per_level else ("fake_score",)
        )

    @property
    def shares(self) -> list[float]:
        """The distinct levels of all grids, as shares of the first one."""
        return sorted({1 - level / n for n, level in self.config.turns}, reverse=True)

    def fake_name(self, u: float) -> str:
        """Which fake model follows samples made from clock value u."""
        if not self.config.fake_per_level:
            return "fake_score"
        top = self.student.path.grid(1)[0]
        return self.fakes[min(range(len(self.shares)), key=lambda i: abs(self.shares[i] * top - u))]

    def schedule(self) -> Schedule:
        """The longest of the trained grids."""
        return self.schedule_for(max(self.config.sizes))

    def schedule_for(self, steps: int) -> Schedule:
        """The grid of `steps` levels, without guidance."""
        return Schedule(self.config.sampler, self.student.path.grid(steps))

    def steps_offered(self) -> tuple[int, ...]:
        """All trained grids."""
        return tuple(sorted(self.config.sizes))

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """The generator's step at every (fake_updates + 1)-th, else the critics' on fresh samples of it."""
        c, (grid, level) = batch.cond, self.place(draw)
        x, u = rollout(self.student, grid, c, draw, self.student.row_shape, until=level)
        turn = not self.critics or draw.step % (self.config.fake_updates + 1) == 0
        with torch.set_grad_enabled(turn):
            x0 = self.student.x0(x, x.new_full((len(x),), self.student.path.time(u)), c)
        yield self.generator_update(x0, u, c, draw) if turn else self.critic_update(x0, u, batch, draw)

    def place(self, draw: Draw) -> tuple[Schedule, int]:
        """Grid and level of this step: drawn; or, with a fake a level, in turn: its critic steps, then the generator's."""
        if not self.config.fake_per_level:
            grid = self.grid(draw)
            return grid, draw.integers("level", grid.steps, per="step")
        turns = self.config.turns
        steps, level = turns[(draw.step + self.config.fake_updates) // (self.config.fake_updates + 1) % len(turns)]
        return self.schedule_for(steps), level

    def grid(self, draw: Draw) -> Schedule:
        """The configured grid, one drawn from several, or random levels below the first."""
        sizes, most = self.config.sizes, self.config.dynamic_grid
        if most is None:
            choice = draw.integers("grid", len(sizes), per="step") if len(sizes) > 1 else 0
            return self.schedule_for(sizes[choice])
        low, high = self.config.levels
        rest = draw.integers("grid", most, per="step")
        below = torch.rand(rest, generator=draw.generator("levels"), dtype=torch.float64) * (high - low) + low
        return Schedule(self.config.sampler, (*self.student.path.grid(1), *below.sort(descending=True)[0].tolist()))

    def generator_update(self, x0: Tensor, u: float, c: Cond, draw: Draw) -> Update:
        """x0 [rows, ...] with graph, made from the clock value u; L_G as a term a direction, and the regularisers."""
        directions, metrics = self.directions(x0.detach(), u, c, draw)
        losses = {branch: pull(x0, direction) for branch, direction in directions.items()}
        if self.config.regularised_by("meanvar"):
            losses["meanvar"] = mean_variance_rows(x0, self.moments.mean, self.moments.var)
        if self.judged:
            losses["gan"] = generator_rows(self.logits(u, [self.noised(x0, draw.within("gan"))], [c])[0])
        return Update("student", losses, metrics={"x0_std": x0.detach().flatten(1).std(1, correction=0), **metrics})

    def critic_update(self, x0: Tensor, u: float, batch: Batch, draw: Draw) -> Update:
        """x0 [rows, ...] without graph: the fake model denoises it, the discriminator tells it from real samples."""
        losses: dict[str, Tensor] = {}
        seated = (self.fake_name(u), "discriminator" if self.judged else "")
        critics = tuple(name for name in self.critics if name in seated)
        if self.fake_name(u) in critics:
            inner = draw.within("fake")
            t, eps = self.student.path.time(inner.uniform("u")), inner.normal("eps", *x0.shape[1:])
            losses["denoise"] = getattr(self, self.fake_name(u)).denoising_loss(x0, eps, t, batch.cond)
        if "discriminator" in critics:
            losses |= self.discrimination(x0, u, batch, draw)
        return Update(critics, losses)

    @torch.no_grad()
    def directions(self, x0: Tensor, u: float, c: Cond, draw: Draw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Normalised D_DM and D_CA ("dm", "ca"; those that are on) for x0 made from clock value u, and monitors."""
        points = self.points(x0, u, draw)
        if not points:
            return {}, {}
        real, directions, metrics = self.teach(points, c), {}, {}
        if "dm" in points:
            fake = getattr(self, self.fake_name(u)).x0(*points["dm"], c)
            directions["dm"] = real["dm"] - fake
            metrics["fake_cosine"] = 1 - cosine_rows(fake, real["dm"])
        if "ca" in points:
            free = real.get("null")  # a base that is told its guidance answers with the guided x0 itself
            scale = self.config.guidance_scale - 1
            directions["ca"] = real["guided"] - real["ca"] if free is None else scale * (real["ca"] - free)
        directions = self.normalised(directions, x0, real, points)
        if len(directions) == 2:
            metrics["dm_over_ca"] = (directions["dm"].square().mean() / directions["ca"].square().mean()).sqrt()
        return directions, metrics

    def points(self, x0: Tensor, u: float, draw: Draw) -> dict[str, Point]:
        """Where each branch looks: x0 noised to its own level with its own noise, or to one for both when coupled."""
        on = {"dm": self.config.regularised_by("dm"), "ca": self.config.guidance_scale != 1}
        branches = [branch for branch, is_on in on.items() if is_on]
        if self.config.schedule == "coupled":
            return dict.fromkeys(branches, self.noised(x0, draw.within("coupled"), clamp=True))
        highest = {"dm": u, "ca": u * self.config.ca_cap}
        capped = {b: highest[b] if b in CAPPED[self.config.schedule] else 1.0 for b in branches}
        return {b: self.noised(x0, draw.within(b), capped[b], clamp=True) for b in branches}

    def noised(self, x0: Tensor, draw: Draw, highest: float = 1.0, clamp: bool = False) -> Point:
        """x0 at levels uniform on the clock below `highest`; clamped to `levels`."""
        t = self.student.path.time(draw.uniform("u", high=highest))
        t = t.clamp(*self.bounds) if clamp else t
        return Point(add_noise(x0, draw.normal("eps", *x0.shape[1:]), t), t)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """`levels` as flow times; on a DDPM path they are shares of its table (timesteps 20..980)."""
        path, (low, high) = self.student.path, self.config.levels
        return (path.time(low), path.time(high)) if isinstance(path, VPPath) else (low, high)

    def teach(self, points: Mapping[str, Point], c: Cond) -> dict[str, Tensor]:
        """The teacher's x0 at the points ("dm", "ca") and at "ca" unconditional or guided ("null", "guided"), in one call."""
        told = self.teacher.embeds_guidance
        plain = self.teacher.told(c, 1.0) if told else c
        asked = {branch: (point, plain) for branch, point in points.items()}
        if "ca" in points and told:
            asked["guided"] = (points["ca"], self.teacher.told(c, self.config.guidance_scale))
        elif "ca" in points:
            asked["null"] = (points["ca"], self.teacher.null(c))
        shared = "dm" in points and points["dm"] is points.get("ca")
        if shared:
            del asked["ca"]
        places, conds = zip(*asked.values())
        x, t = torch.cat([p.x for p in places]), torch.cat([p.t for p in places])
        real = dict(zip(asked, self.teacher.x0(x, t, Cond.cat(conds)).chunk(len(asked))))
        return {**real, "ca": real["dm"]} if shared else real

    def normalised(
        self, directions: Mapping[str, Tensor], x0: Tensor, real: Mapping[str, Tensor], points: Mapping[str, Point]
    ) -> dict[str, Tensor]:
        """Directions over m = max(norm_min, mean |x0 - anchor|) a row, and times the factor of `space`."""
        anchors, out = self.anchors(directions, real), {}
        for branch, direction in directions.items():
            factor = SPACES[self.config.space](points[branch].t)
            if branch in anchors:
                factor = factor / l1_rows(x0, anchors[branch]).clamp_min(self.config.norm_min)
            out[branch] = torch.nan_to_num(direction * expand(factor, direction), nan=0.0, posinf=0.0, neginf=0.0)
        return out

    def anchors(self, directions: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """per_branch: the branch's own conditional teacher. dmd2: one for both, the guided teacher. none: nothing."""
        if self.config.normaliser == "none":
            return {}
        if self.config.normaliser == "per_branch":
            return {branch: real[branch] for branch in directions}
        return dict.fromkeys(directions, real["ca"] + directions["ca"] if "ca" in directions else real["dm"])

    def logits(self, u: float, points: list[Point], conds: list[Cond]) -> tuple[Tensor, ...]:
        """The discriminator's logits [rows] at each point, from one call of the network whose features it reads."""
        name = self.fake_name(u) if self.config.gan_features == "fake_score" else self.config.gan_features
        eyes: Denoiser = getattr(self, name)
        x, t = torch.cat([p.x for p in points]), torch.cat([p.t for p in points])
        features = eyes.features(x, t, Cond.cat(conds), self.config.gan_layers)
        return self.discriminator(features).chunk(len(points))

    def discrimination(self, x0: Tensor, u: float, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """softplus(D(x0)) + softplus(-D(real)), each noised on its own; r1: how far D moves when real does by 0.1 n."""
        real = self.noised(batch.x0, draw.within("real"))
        points = [self.noised(x0, draw.within("made")), real]
        if "r1" in self.config.weights:
            nudge = 0.1 * draw.normal("r1", *x0.shape[1:]) * expand(1 - real.t, x0)
            points.append(Point(real.x + nudge, real.t))
        made, seen, *moved = self.logits(u, points, [batch.cond] * len(points))
        penalty = {"r1": mse_rows(seen, moved[0])} if moved else {}
        return {"discriminator": discriminator_rows(seen, made), **penalty}

    def on(self, event: Event) -> None:
        """After a generator step the fake model is pulled towards the student (SenseFlow, arXiv 2506.00523)."""
        if self.config.fake_pull is None or event.kind != "step_end" or "student" not in event.updated:
            return
        for name in self.fakes:
            if name in self.critics:
                getattr(self, name).pull_towards(self.student, keep=self.config.fake_pull)

    @cached_property
    def moments(self) -> Moments:
        """What meanvar aims at: as configured, or the average over samples of the source `train`."""
        if isinstance(self.config.moments, Moments):
            return self.config.moments
        source = self.sources["train"]
        rows = source.fetch(torch.arange(min(len(source), MEASURED_ROWS)), None)
        if "x0" not in rows:
            raise UserError("data.train holds no samples to measure: write config.moments as {mean: 0.0, var: 1.0}")
        flat = rows["x0"].float().flatten(1)
        return Moments(mean=flat.mean().item(), var=flat.var(1, correction=0).mean().item())

    def _head(self, handles: Mapping[str, Handle]) -> Discriminator:
        from ...models.denoiser import Denoiser

        # The fake model starts as a copy of the teacher, so its features have the teacher's shapes.
        return Discriminator.reading(Denoiser.of(handles["teacher"]), self.config.gan_layers)
