"""Flow matching (Lipman et al., arXiv 2210.02747): trains a denoiser on data, the teacher of everything else.

    x_t = (1 - t) x0 + t eps,   L = E |output(x_t, t, c) - target(x0, eps, t)|^2

in the network's own parameterisation: the target is v = eps - x0 on a flow path and eps on a DDPM path. A share of
conditions is replaced by the null condition, so that one network serves classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...data.batch import Cond
from ...maths.clocks import logit_normal
from ...maths.solvers import Schedule
from ...roles import Role
from ..base import DiffusionMethod, Levels, MethodConfig, Paper, Total, Update

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw
    from ...models.denoiser import Denoiser


class FlowMatchingConfig(MethodConfig):
    """Knobs of `FlowMatching`."""

    terms: ClassVar[tuple[str, ...]] = ("denoise",)
    time: Literal["uniform", "logit_normal", "mix"] = Field(
        default="uniform", description="law of the clock u; `mix`: half the rows of each"
    )
    time_mean: float = Field(default=0.0, description="of the logit-normal law")
    time_std: float = Field(default=1.0, gt=0, description="of the logit-normal law")
    label_dropout: float = Field(default=0.1, ge=0, le=1, description="share of rows trained without condition")
    steps: int = Field(default=50, gt=0, description="of the sampler")
    guidance_scale: float = Field(default=1.0, ge=0, description="of the sampler; 1 = off")


class FlowMatching(DiffusionMethod):
    """Needs samples with conditions (`batch.x0`, `batch.cond`) and one network, `student`."""

    name = "flow_matching"
    paper = Paper("Flow Matching for Generative Modeling", "arXiv:2210.02747")
    proven = "measured"
    Config = FlowMatchingConfig
    student: Denoiser

    def roles(self) -> tuple[Role, ...]:
        """The network, tuned in full and averaged."""
        return (Role("student", tune="full", defaults={"ema": 0.999}),)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One denoising regression on noised data."""
        t = self.student.path.time(self.clock(draw))
        eps = draw.normal("eps", *batch.x0.shape[1:])
        cond = self.dropped(batch.cond, draw)
        error = self.student.denoising_loss(batch.x0, eps, t, cond)
        yield Update("student", {"denoise": error}, levels={"denoise": Levels(error, t)})

    def clock(self, draw: Draw) -> Tensor:
        """Clock values u [rows] by the configured law."""
        config = self.config
        if config.time == "uniform":
            return draw.uniform("u")
        bell = logit_normal(draw.normal("time"), config.time_mean, config.time_std)
        if config.time == "logit_normal":
            return bell
        return torch.where(draw.choice("mix", 0.5), bell, draw.uniform("u"))

    def dropped(self, cond: Cond, draw: Draw) -> Cond:
        """`cond` with some rows replaced by the null condition; nothing to drop in an empty one."""
        share = self.config.label_dropout
        return self.student.dropped(cond, draw.choice("dropout", share)) if share else cond

    def schedule(self) -> Schedule:
        """The plain Euler sampler (DDIM on a DDPM path) with guidance."""
        return Schedule("ode", self.student.path.grid(self.config.steps), self.config.guidance_scale)
