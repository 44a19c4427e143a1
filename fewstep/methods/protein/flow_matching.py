"""Flow matching of protein backbones (Proteina, Geffner et al., arXiv 2503.00710): the teacher of `sid_protein`.

    x_t = (1 - t) x0 + t eps,   L = E |v(x_t, t, c) - (eps - x0)|^2 + distogram,   1 - t ~ .98 Beta(1.9, 1) + .02 U(0, 1)

on centred chains with centred noise. In half of the steps the network is also told its own prediction of the clean chain,
without gradient. Labels of folds are hidden by levels, so that one network serves guidance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...data.batch import Cond
from ...data.folds import check_folds
from ...maths.log_path import teacher_schedule
from ...maths.paths import add_noise
from ...maths.scalars import Scalar
from ...maths.solvers import Schedule
from ...nets.distogram import Distogram, distogram_rows
from ...nets.watching import watched
from ...roles import Handle, Role
from ..base import DiffusionMethod, Levels, MethodConfig, Paper, Total, Update

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...draws import Draw
    from ...models.denoiser import Denoiser

FEATURES = "norm"  # the layer whose output stands for a residue


class ProteinFlowMatchingConfig(MethodConfig):
    """Knobs of `ProteinFlowMatching`. `weights`: denoise, distogram; a distogram of weight 0 has no head."""

    default_weights: ClassVar[Mapping[str, Scalar]] = {"denoise": 1.0, "distogram": 1.0}
    terms: ClassVar[tuple[str, ...]] = ("denoise", "distogram")
    time_power: float = Field(default=1.9, gt=0, description="a of Beta(a, 1), the law of 1 - t")
    uniform_share: float = Field(default=0.02, ge=0, le=1, description="of the rows whose t is uniform instead")
    self_conditioning: float = Field(default=0.5, ge=0, le=1, description="share of steps that are told a prediction")
    fold_dropout: float = Field(default=0.5, ge=0, le=1, description="of each level of a fold label, from the finest")
    distogram_below: float = Field(default=0.7, gt=0, le=1, description="noise level t under which distances are told")
    steps: int = Field(default=400, gt=0, description="of the sampler")
    noise_scale: float = Field(default=0.45, ge=0, description="of the sampler: factor of the noise's variance")
    renewal: float | None = Field(
        default=None, ge=0, le=1, description="of the sampler: largest share of the noise replaced in a step"
    )


class ProteinFlowMatching(DiffusionMethod):
    """Needs chains (`batch.x0`, `batch.cond.mask`, maybe `batch.cond.cath`)."""

    name = "protein_flow_matching"
    paper = Paper("Proteina: Scaling Flow-based Protein Structure Generative Models", "arXiv:2503.00710")
    Config = ProteinFlowMatchingConfig
    draws = "chains"
    student: Denoiser
    distogram: Handle

    def roles(self) -> tuple[Role, ...]:
        """The network, and the head that tells distances while it trains."""
        student = Role("student", "full", defaults={"ema": 0.999})
        return (student, Role("distogram", "full", build=_head)) if self._tells_distances else (student,)

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """As in `Method`; UserError when the data's folds are not the network's."""
        super().bind(handles, sources, stores)
        check_folds(sources, self.student.module)

    @property
    def _tells_distances(self) -> bool:
        return self.config.weights["distogram"] != 0

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One regression on noised chains, and the distances told from its features."""
        t, cond = self.times(draw), self.hidden(batch.cond, draw)
        eps = draw.normal("eps", *batch.x0.shape[1:])
        if draw.choice("self", self.config.self_conditioning, per="step"):
            with torch.no_grad():
                cond = cond.with_(x_self=self.student.x0(add_noise(batch.x0, eps, t), t, cond))
        with watched(self.student.module, FEATURES) as seen:
            error = self.student.denoising_loss(batch.x0, eps, t, cond)
        losses = {"denoise": error}
        if self._tells_distances:
            told = distogram_rows(self.distogram(seen[FEATURES]), batch.x0, cond["mask"])
            losses["distogram"] = told * (t < self.config.distogram_below)
        trained = ("student", "distogram") if self._tells_distances else "student"
        yield Update(trained, losses, levels={"denoise": Levels(error.detach(), t)})

    def times(self, draw: Draw) -> Tensor:
        """t [rows]: 1 - u^(1/a), which makes 1 - t a Beta(a, 1), or for some rows uniform."""
        u = draw.uniform("u")
        return 1 - torch.where(draw.choice("flat", self.config.uniform_share), u, u ** (1 / self.config.time_power))

    def hidden(self, cond: Cond, draw: Draw) -> Cond:
        """Fold labels with their finest level hidden in a share of the rows, in a share of those also the next, and so on."""
        if "cath" not in cond:
            return cond
        cath, gone = cond["cath"].clone(), torch.ones(len(cond["cath"]), dtype=torch.bool, device=cond["cath"].device)
        for level in reversed(range(cath.shape[1])):
            gone = gone & draw.choice(f"hide.{level}", self.config.fold_dropout)
            cath[:, level] = torch.where(gone, 0, cath[:, level])
        return cond.with_(cath=cath)

    def schedule(self) -> Schedule:
        """Velocity and score together."""
        path: Any = self.student.path
        return teacher_schedule(path, self.config.steps, self.config.noise_scale, self.config.renewal)


def _head(handles: Mapping[str, Handle]) -> nn.Module:
    norm: Any = handles["student"].module.get_submodule(FEATURES)
    return Distogram(norm.normalized_shape[0])
