"""Tiny protein students and teachers with random weights, and their chains by our own solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.exporting.folder import export
from fewstep.maths.log_path import LogFlowPath
from fewstep.maths.solvers import Schedule, sample
from fewstep.models.denoiser import Denoiser
from fewstep.models.registry import FAMILIES
from fewstep.roles import Handle, Role, RoleSpec
from tests.pipelines.proteins import protein_network


@dataclass
class ProteinStudent:
    """A network, its path and how it is sampled."""

    module: nn.Module
    path: LogFlowPath
    schedule: Schedule

    def chains(self, lengths: list[int], seed: int = 0) -> Tensor:
        """[rows, residues, 3] in nanometres by `maths.solvers.sample`; chain i has noise (seed, i)."""
        handle = Handle(Role("student"), self.module, RoleSpec(), "frozen", None, "protein_flow", self.path)
        cond = Cond(mask=torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])
        denoiser = Denoiser.of(handle)
        return sample(denoiser, self.schedule, cond, Draw.for_images(seed, range(len(lengths))), denoiser.shape(cond))

    def export(self, out: Path, **card: Any) -> Path:
        """Its folder."""
        family = FAMILIES.get("protein_flow")
        offered = [self.schedule.steps] if self.schedule.kind == "sde" else []
        said = {"method": "toy", **card}
        return export(self.module, family, self.path, self.schedule, out, steps_offered=offered, card=said)


def protein_student(steps: int = 4, noise_scale: float = 0.45, **config: Any) -> ProteinStudent:
    """Sampled as distilled Proteina is."""
    path = LogFlowPath(t_max=10**-0.15, zero_signal=True)
    schedule = Schedule("renoise", path.grid(steps), noise_scale=noise_scale)
    return ProteinStudent(protein_network(**config), path, schedule)


def protein_teacher(steps: int = 20, renewal: float | None = None, **config: Any) -> ProteinStudent:
    """Sampled by velocity and score."""
    path = LogFlowPath()
    levels = [(10 ** (-2 * k / steps) - 0.01) / 0.99 for k in range(steps)]
    u = tuple(path.clock(t) for t in levels)
    schedule = replace(Schedule("sde", u, noise_scale=0.45), renewal=renewal)
    return ProteinStudent(protein_network(**config), path, schedule)
