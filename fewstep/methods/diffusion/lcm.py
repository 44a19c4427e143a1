"""Latent consistency distillation (Luo et al., arXiv 2310.04378; as adapters: LCM-LoRA, arXiv 2311.05556).

    x_n = (1 - t_n) x0 + t_n eps,   x_m = DDIM step of the guided teacher from t_n to t_m
    L = huber( f_theta(x_n, t_n, c, g), sg f_ema(x_m, t_m, c, g) )

with n uniform on the grid, m one level below, and f the boundary-scaled clean prediction. The guidance g is drawn from
a range for each row and fed to the student, or fixed; the student itself is never guided. Works on pixels as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..base import Paper, Total, Update
from .trajectory import TrajectoryConfig, TrajectoryMethod

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw


class LCM(TrajectoryMethod):
    """Needs samples with conditions, a teacher with an unconditional branch (or guidance_scale 1), and a student."""

    name = "lcm"
    paper = Paper("Latent Consistency Models", "arXiv:2310.04378")
    proven = "measured"
    Config = TrajectoryConfig

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One step of the teacher, one comparison."""
        guidance, at = self.guidance(draw), self.interval(draw)
        c = self.told(batch.cond, guidance)
        x = self.noised(batch.x0, at.u, draw)
        target = self.target(self.walked(x, at, batch.cond, guidance, draw), at.u_next, c)
        prediction = self.f(self.student, x, at.u, c)
        x0_std = prediction.detach().flatten(1).std(1, correction=0)
        yield Update("student", {"consistency": self.compare(prediction, target)}, metrics={"x0_std": x0_std})
