"""Stochastic consistency distillation (SCott; Liu et al., arXiv 2403.01505).

    x_n = (1 - t_n) x0 + t_n eps,   x_m = h steps of an SDE solver of the guided teacher from t_n to t_m
    L   = huber( f_theta(x_n, t_n, c, g), sg f_ema(x_m, t_m, c, g) ) - lambda D(f_theta(x_n, t_n, c, g), c)

The solver follows dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW with fresh noise in each of its h steps. D reads the
teacher's features through low-rank adapters of its own and tells f_theta from data. With eta = 0, h = 1 and without D
this is LCM. What a squared loss learns is the mean end point of the solver's paths, for eta = 1 and an exact teacher
the posterior mean: D is what makes one step sharp.

The paper published no code; solver, sub-steps, adversarial form and defaults follow its text and public notes on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...data.batch import Cond
from ...errors import UserError
from ...maths.consistency import walk
from ...maths.losses import discriminator_rows, generator_rows, mse_rows
from ...maths.paths import VPPath, expand
from ...maths.scalars import Ramp, Scalar, value
from ...maths.sde import keeps_state, sde_solver
from ...nets.discriminator import Discriminator
from ...roles import Handle, Role
from ..base import Event, Paper, Stage, Total, Update
from .trajectory import Interval, TrajectoryConfig, TrajectoryMethod

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw
    from ...models.denoiser import Denoiser
    from ...store import Store

NUDGE = 0.1  # how far r1 moves a real sample, in units of the data


class SCottConfig(TrajectoryConfig):
    """Knobs of `SCott`. `weights`: consistency, adversarial for the student; discriminator, r1 for D.

    `adversarial: null` or a weight of 0 removes D. r1 is on when a weight is given; 1 to 100 are usual.
    """

    default_weights: ClassVar[Mapping[str, Scalar]] = {"consistency": 1.0, "adversarial": 0.4, "discriminator": 1.0}
    terms: ClassVar[tuple[str, ...]] = ("consistency", "adversarial", "discriminator", "r1")
    levels: int | None = Field(default=None, gt=0, description="of the grid; null: the DDPM table, 1000 on flow paths")
    solver: Literal["er_sde", "ddim_eta", "euler_maruyama", "sde_dpm_2"] = "er_sde"
    eta: Scalar = Field(default=1.0, description="strength of the solver's noise: 0 ODE, 1 reverse diffusion")
    eta_range: tuple[float, float] = Field(default=(0.0, 1.0), description="clock range with noise; outside eta is 0")
    substeps: Scalar = Field(default=3.0, description="h, steps of the solver from a level to its target; rounded")
    skip: Scalar | None = Field(default=0.024, description="k, clock from a level to its target; null: one level")  # type: ignore[assignment]
    adversarial: Literal["hinge", "linear", "softplus"] | None = Field(default="hinge", description="null: without D")
    disc_input: Literal["clean", "renoise"] = Field(
        default="clean", description="D sees samples as they are, labelled with their level, or noised to a drawn one"
    )
    heads: Literal["mean", "conv"] = "mean"
    layers: tuple[str, ...] | None = Field(default=None, description="that D reads; null: the family's deepest")

    @model_validator(mode="after")
    def _solvable(self) -> SCottConfig:
        if min(ends(self.eta)) < 0:
            raise ValueError(f"eta={ends(self.eta)} must not be negative")
        if self.solver == "ddim_eta" and max(ends(self.eta)) > 1:
            raise ValueError("solver ddim_eta takes eta up to 1: choose er_sde for more noise")
        if not 0 <= self.eta_range[0] < self.eta_range[1] <= 1:
            raise ValueError(f"eta_range={list(self.eta_range)} must increase within [0, 1]")
        if min(ends(self.substeps)) < 1:
            raise ValueError(f"substeps={ends(self.substeps)} must be at least 1")
        if self.skip is not None and not 0 < min(ends(self.skip)) <= max(ends(self.skip)) < 1:
            raise ValueError(f"skip={ends(self.skip)} must lie between 0 and 1")
        if self.judged and self.adversarial == "linear" and not self.penalised:
            raise ValueError("adversarial linear has no bound on D: add a penalty, weights.r1=10, or choose hinge")
        return self

    @property
    def judged(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial is not None and self.weights["adversarial"] != 0

    @property
    def penalised(self) -> bool:
        """Whether D pays for being steep."""
        return self.weights.get("r1", 0) != 0


class SCott(TrajectoryMethod):
    """Needs samples with conditions, a teacher with an unconditional branch (or guidance_scale 1), and a student."""

    name = "scott"
    paper = Paper("SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation", "arXiv:2403.01505")
    proven = "reconstruction"
    Config = SCottConfig
    discriminator: Denoiser
    heads: Handle

    def roles(self) -> tuple[Role, ...]:
        """Teacher and student; for D an adapter on the teacher's weights, and heads on its features."""
        slow: dict[str, Any] = {"optimizer": {"lr": 2e-5}}
        adapter = Role("discriminator", "lora", "teacher", defaults={**slow, "lora": {"rank": 64}})
        return (*super().roles(), adapter, Role("heads", "full", build=self._heads, defaults=slow))

    def stages(self) -> Sequence[Stage]:
        """One; without a D its roles stay in the recipe's vocabulary and are never loaded."""
        critics = ("discriminator", "heads") * self.config.judged
        return (Stage("train", self.train_step, trains=("student", *critics), uses=("teacher", "student", *critics)),)

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Store]) -> None:
        """As in `DiffusionMethod`; UserError when the solver would forget the state that it starts from."""
        super().bind(handles, sources, stores)
        self._check_first_step()

    def on(self, event: Event) -> None:
        """Looks again before training: the export may have settled on a path that begins nearer to noise."""
        if event.kind == "stage_start":
            self._check_first_step()

    def _check_first_step(self) -> None:
        t, t_next = (self.path.time(torch.tensor([u], dtype=torch.float64)) for u in (self.top, 0.99 * self.top))
        eta = max(ends(self.config.eta))
        if not keeps_state(self.config.solver, t, t_next, self.within_range(t, eta)):
            raise UserError(
                f"config.eta={eta:g} at t = 1, where a noisy step of {self.config.solver} forgets the state (alpha = 0), so "
                "its target tells nothing: write config.eta_range=[0, 0.98] (no noise above), solver ddim_eta with eta "
                "below 1, or eta 0"
            )

    @property
    def levels(self) -> int:
        """As configured, else every entry of a DDPM table, 1000 levels of a flow path."""
        if self.config.levels is not None:
            return self.config.levels
        return len(self.path.alphas_cumprod) if isinstance(self.path, VPPath) else 1000

    @property
    def top(self) -> float:
        """The first level."""
        return self.grid()[0]

    def skip(self, step: int) -> float | None:
        """k at this step of training."""
        return None if self.config.skip is None else value(self.config.skip, step)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """h noisy steps of the teacher, one comparison; then D's turn on what the student made."""
        guidance, at = self.guidance(draw), self.interval(draw)
        c = self.told(batch.cond, guidance)
        x = self.noised(batch.x0, at.u, draw)
        target = self.target(self.walked(x, at, batch.cond, guidance, draw), at.u_next, c)
        made = self.f(self.student, x, at.u, c)
        losses = {"consistency": self.compare(made, target)}
        if self.config.judged:
            t = self.judged_at(at, draw)
            losses["adversarial"] = self.fooling(made, t, batch.cond, draw)
        x0_std = made.detach().flatten(1).std(1, correction=0)
        yield Update("student", losses, metrics={"x0_std": x0_std})
        if self.config.judged:
            yield self.discrimination(made.detach(), t, batch, draw)

    # ---- the solver

    @torch.no_grad()
    def walked(self, x: Tensor, at: Interval, cond: Cond, guidance: Tensor | float, draw: Draw) -> Tensor:
        """Where h guided steps of the SDE solver, each with noise of its own, take x from u to u_next."""
        solve, noise = sde_solver(self.config.solver), draw.within("solver")
        eta, substeps = value(self.config.eta, draw.step), round(value(self.config.substeps, draw.step))

        def move(x: Tensor, x0: Tensor, t: Tensor, t_next: Tensor, part: int) -> Tensor:
            return solve(x, x0, t, t_next, self.within_range(t, eta), noise.normal(f"{part}", *x.shape[1:]))

        return walk(x, *at, self.path, self.guided(cond, guidance), move, substeps)

    def within_range(self, t: Tensor, eta: float) -> Tensor:
        """eta at flow times t [rows], float64: 0 outside of `eta_range`."""
        low, high = (self.path.time(u) for u in self.config.eta_range)
        return eta * ((t >= low) & (t <= high)).double()

    # ---- the discriminator

    def judged_at(self, at: Interval, draw: Draw) -> Tensor:
        """Flow times [rows] that D is told: those of the student's inputs, or levels of the grid drawn anew."""
        if self.config.disc_input == "clean":
            return self.time(at.u)
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=draw.device)
        return self.time(grid[draw.integers("judged", len(grid))])

    def shown(self, x0: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """What D is shown of x0 as a flow state: gain x0, and when noised again + t eps."""
        x = expand(self.gain(t), x0) * x0
        if self.config.disc_input == "clean":
            return x
        return x + expand(t, x0) * draw.normal("eps", *x0.shape[1:])

    def gain(self, t: Tensor) -> Tensor:
        """1 - t when noised again; else what makes the native state x0 itself, although it is labelled t."""
        if self.config.disc_input == "renoise":
            return 1 - t
        return self.path.scale(0.0) / self.path.scale(t)

    def logits(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D's logits [rows]; it is told time and text, not the guidance."""
        return self.heads(self.discriminator.features(x, t, cond, self.config.layers))

    def fooling(self, made: Tensor, t: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """The student's loss -D(made) [rows] (softplus: of it), with gradient through D to `made`."""
        return generator_rows(
            self.logits(self.shown(made, t, draw.within("fooling")), t, cond), self.config.adversarial
        )

    def discrimination(self, made: Tensor, t: Tensor, batch: Batch, draw: Draw) -> Update:
        """D's update on samples and on what the student made of them; r1: how far D moves when a sample moves by 0.1 n."""
        real = self.shown(batch.x0, t, draw.within("real"))
        rows = [real, self.shown(made, t, draw.within("made"))]
        if self.config.penalised:
            rows.append(real + expand(self.gain(t), real) * NUDGE * draw.normal("r1", *real.shape[1:]))
        n = len(rows)
        seen, fake, *moved = self.logits(torch.cat(rows), t.repeat(n), Cond.cat([batch.cond] * n)).chunk(n)
        losses = {"discriminator": discriminator_rows(seen, fake, self.config.adversarial)}
        penalty = {"r1": mse_rows(seen, moved[0])} if moved else {}
        metrics = {"logits_real": seen.detach(), "logits_fake": fake.detach()}
        return Update(("discriminator", "heads"), {**losses, **penalty}, metrics=metrics)

    def _heads(self, handles: Mapping[str, Handle]) -> Discriminator:
        from ...models.denoiser import Denoiser

        return Discriminator.reading(Denoiser.of(handles["teacher"]), self.config.layers, self.config.heads)


def ends(scalar: Scalar) -> tuple[float, float]:
    """First and last value over training; a schedule stays between them."""
    return value(scalar, 0), value(scalar, scalar.over if isinstance(scalar, Ramp) else 0)
