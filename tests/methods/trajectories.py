"""Consistency methods set up for tests: on wavy point networks, on a tiny UNet, and on a network that is told a guidance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.maths.paths import Path, VPPath
from fewstep.methods.base import DiffusionMethod, Update
from fewstep.models.denoiser import Denoiser
from fewstep.models.oracle import OracleFamily
from fewstep.roles import RoleSpec, assemble
from tests.oracles.harness import seat

ROWS = 8
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def table(prediction: str = "epsilon") -> VPPath:
    """Stable Diffusion's table."""
    return VPPath.from_scheduler({**BETAS, "prediction_type": prediction})


class Wavy(nn.Module):
    """A network without special structure: a x + .3 sin(2 x + .01 k + label), and + g guidance / 10 when told one."""

    def __init__(self, a: float = 0.6, g: float = 0.2, dim: int = 3):
        super().__init__()
        self.a, self.g = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(g))
        self.dim, self.null = dim, 10
        self.told: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The output at x [rows, dim]."""
        place = (0.01 * timestep + label)[:, None]
        out = self.a * x + 0.3 * torch.sin(2 * x + place)
        if guidance is None:
            return out
        self.told.append(guidance.detach())
        return out + self.g * guidance.to(x.dtype)[:, None] / 10


class ToldFamily(OracleFamily):
    """Hands the guidance of a condition to the network."""

    def __init__(self) -> None:
        self.name = "told"

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """(x, timestep, label, guidance)."""
        return {**super().pack(module, x, timestep, cond), "guidance": cond["guidance"]}


def seated(method: DiffusionMethod, path: Path | None = None, student: float = 0.5) -> Any:
    """The method on wavy networks; the student differs from the teacher, and is told its guidance if it asks for it."""
    nets = {"teacher": Wavy(), "student": Wavy(student)}
    seat(method, {role.name: nets[role.name] for role in method.roles()}, path)
    if method.config.embedded:
        method.student = Denoiser(method.student.handle, ToldFamily(), method.student.path)
    return method


def assembled(method: DiffusionMethod, sizes: dict, tune: str) -> Any:
    """The method on a tiny UNet, a little away from "student = teacher"."""
    said = {"tune": tune, "lora": {"rank": 2, "targets": "all"}}
    specs = {"teacher": RoleSpec(**{"from": "unet2d", "build": sizes}), "student": RoleSpec(**said)}
    handles = assemble(method.roles(), specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values():
        for p in handle.trainable().values():
            p.data.add_(0.02 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def draw(rows: int = ROWS, step: int = 0, first: int = 0) -> Draw:
    """The numbers of the rows `first` ... of a step."""
    return Draw(5, step, np.arange(first, first + rows))


def points(rows: int = ROWS, dim: int = 3, first: int = 0) -> Batch:
    """Rows of points with labels; row i is the same in every batch."""
    ids = torch.arange(first, first + rows)
    x0 = torch.randn(64, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[ids]
    return Batch(ids, {"cond": Cond(label=ids % 10), "x0": x0})


def images(rows: int = ROWS) -> Batch:
    """8x8 pictures with labels."""
    ids = torch.arange(rows)
    x0 = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(ids, {"cond": Cond(label=ids % 10), "x0": x0})


def only(method: DiffusionMethod, batch: Batch | None = None, step: int = 0) -> Update:
    """The one update of a step."""
    batch = points() if batch is None else batch
    said: Iterator = method.train_step(batch, draw(len(batch), step, int(batch.ids[0])))
    (update,) = said
    return update


def touched(module: nn.Module) -> int:
    """Parameters that hold a gradient."""
    return sum(p.grad is not None for p in module.parameters())


def halves_agree(method: DiffusionMethod, step: int = 0) -> bool:
    """Whether a batch and its two halves, drawn at their own slots, give the same losses row by row."""
    whole = only(method, step=step)
    parts = [only(method, points(ROWS // 2, first=first), step) for first in (0, ROWS // 2)]
    return all(
        torch.allclose(rows, torch.cat([part.losses[name] for part in parts]), rtol=1e-12)
        for name, rows in whole.losses.items()
    )
