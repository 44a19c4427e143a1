"""Score identity distillation of protein backbones (distilled Proteina): CA chains in eight to twenty steps.

The method is SiD's (arXiv 2404.04057) with alpha = 1, of which the losses and the game are those of `sid`. What differs:

    rollout  x_1 = t_1 n,  x_i = (1 - t_i) x_hat_{i-1} + t_i n_i,  t_i = 10^(-k_i / 200), k from 30 to 400
    fake     1 - t ~ .98 Beta(1.9, 1) + .02 U(0, 1),  the teacher's own law
    student  t = 10^(-k / 200), k uniform: as many levels in each decade
    sampling the same recursion with all noise scaled by `noise_scale`

Chains are centred and masked wherever they enter a network or a loss (`Denoiser.project`). No data: lengths alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...data.batch import Cond
from ...data.folds import check_folds
from ...maths.log_path import FIRST, PER_DECADE, LogFlowPath, few_step_schedule
from ...maths.scalars import Scalar
from ...maths.solvers import Schedule
from ...roles import Role
from ..base import Paper
from ..diffusion.sid import SiD, SiDConfig

if TYPE_CHECKING:
    from ...draws import Draw


class SiDProteinConfig(SiDConfig):
    """Knobs of `SiDProtein`, as of `SiD`, and how a student is sampled."""

    default_weights: ClassVar[Mapping[str, Scalar]] = {"sid": 100.0, "denoise": 1.0}
    terms: ClassVar[tuple[str, ...]] = ("sid", "denoise")
    steps: int | tuple[int, ...] = Field(default=16, description="calls a sample; a list: one is drawn at each step")
    start: float | None = Field(
        default=LogFlowPath().clock(10 ** (-FIRST / PER_DECADE)),
        description="clock of the first level, whose input has no signal",
    )
    noise: Literal["log_uniform", "uniform"] = "log_uniform"
    weight: Literal["mean", "sum_over_n", "snr", "none"] = Field(  # type: ignore[assignment]
        default="mean", description="what W is; sum_over_n: the released code's, n times `mean`, without its floor"
    )
    time_power: float = Field(default=1.9, gt=0, description="a of Beta(a, 1), the fake model's law of 1 - t")
    uniform_share: float = Field(default=0.02, ge=0, le=1, description="of its rows whose t is uniform instead")
    noise_scale: float = Field(default=0.45, ge=0, description="of the exported model: factor of all noise")
    adversarial: Literal[False] = False


class SiDProtein(SiD):
    """Needs lengths alone (`batch.cond.mask`)."""

    name = "sid_protein"
    paper = Paper("Distilled Protein Backbone Generation", "arXiv:2510.03095")
    Config = SiDProteinConfig
    draws = "chains"

    def roles(self) -> tuple[Role, ...]:
        """Teacher, and two full copies of it."""
        student = {"optimizer": {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-6}, "ema_half_life": 500_000}
        fake = {"optimizer": {"lr": 1e-4, "betas": (0.0, 0.999), "eps": 1e-6}}
        return (
            Role("teacher"),
            Role("student", "full", "teacher", defaults=student),
            Role("fake_score", "full", "teacher", defaults=fake),
        )

    def bind(self, handles: Mapping[str, Any], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """As of `SiD`; UserError when the data's folds are not the network's."""
        super().bind(handles, sources, stores)
        check_folds(sources, self.student.module)

    def fake_level(self, draw: Draw) -> Tensor:
        """t [rows]: the law the teacher was trained with, within `levels`."""
        u = draw.uniform("u")
        tau = torch.where(draw.choice("flat", self.config.uniform_share), u, u ** (1 / self.config.time_power))
        return (1 - tau).clamp(*self.config.levels)

    def normaliser(self, x0: Tensor, real: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """As of `SiD`; `sum_over_n` makes a chain of n residues count 1 / n."""
        if self.config.weight != "sum_over_n":
            return super().normaliser(x0, real, t, cond)
        return cond["mask"].sum(1) * self.mean_rows((x0 - real).abs(), cond).detach()

    def schedule(self) -> Schedule:
        """As the exported folder is sampled: the longest trained grid, with less noise."""
        path: Any = self.path
        return few_step_schedule(path, max(self.config.sizes), self.config.noise_scale)
