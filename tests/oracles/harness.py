"""Runs a method's step generator without the trainer, and measures how far samples are from the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.maths.paths import FlowPath, Path
from fewstep.maths.scalars import value
from fewstep.maths.solvers import Schedule, sample
from fewstep.methods.base import DiffusionMethod, Event, Update
from fewstep.roles import Handle, RoleSpec

DRAW_SEED = 7


class Affine(nn.Module):
    """The linear generator x0 = gain x + offset, as a flow network: v = (x - x0) / t."""

    def __init__(self, gain: float, offset: float, dim: int = 1):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.offset = nn.Parameter(torch.full((dim,), offset))
        self.dim, self.null = dim, 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """v at x [rows, dim]."""
        return (x - self.gain * x - self.offset) / (timestep / 1000)[:, None]


def seat(method: DiffusionMethod, networks: Mapping[str, nn.Module], path: Path | None = None) -> DiffusionMethod:
    """Gives the roles of `method` that are named here their networks: frozen roles frozen, all others tuned in full."""
    handles = {}
    for role in method.roles():
        if role.name not in networks:
            continue
        module = networks[role.name]
        tune = "frozen" if role.tune == "frozen" else "full"
        module.requires_grad_(tune == "full")
        family = None if role.name in ("discriminator", "weight") else "gaussian"  # how networks on points are called
        handles[role.name] = Handle(role, module, RoleSpec(), tune, family=family, path=family and (path or FlowPath()))
    method.bind(handles, {}, {})
    return method


def batch(rows: int, classes: int = 1, **fields: Any) -> Batch:
    """Rows with ids 0.. and labels that go round."""
    ids = torch.arange(rows)
    return Batch(ids, {"cond": Cond(label=ids % classes), **fields})


def draw(step: int, rows: int) -> Draw:
    """The numbers of one step."""
    return Draw(DRAW_SEED, step, np.arange(rows))


def updates(method: DiffusionMethod, steps: Iterable[int], data: Callable[[int], Batch]) -> Iterator[Update]:
    """The updates that `train_step` yields at these steps, before anything is stepped."""
    for step in steps:
        rows = data(step)
        for said in method.train_step(rows, draw(step, len(rows))):
            assert isinstance(said, Update)
            yield said
        method.on(Event("step_end", "train", step + 1, updated=said.role_names))


def train(
    method: DiffusionMethod,
    steps: Iterable[int],
    data: Callable[[int], Batch],
    optimizers: Mapping[str, torch.optim.Optimizer],
    after: Callable[[int, Update], None] | None = None,
) -> None:
    """Trains: for each update backward into its roles alone, and a step of their optimisers. `after` sees each one."""
    for count, update in enumerate(updates(method, steps, data)):
        backward(method, update)
        for role in update.role_names:
            optimizers[role].step()
            optimizers[role].zero_grad(set_to_none=True)
        if after is not None:
            after(count, update)


def backward(method: DiffusionMethod, update: Update) -> None:
    """Gradients of the weighted terms, averaged over rows, into the update's roles and nowhere else."""
    weights = method.config.weights
    terms = [value(weights.get(name, 1.0), 0) * rows.mean() for name, rows in update.losses.items()]
    parameters = [p for role in update.role_names for p in getattr(method, role).trainable().values()]
    torch.autograd.backward(torch.stack(terms).sum(), inputs=parameters)


def samples(method: DiffusionMethod, schedule: Schedule, rows: int, classes: int = 1) -> Tensor:
    """Finished samples of the student [rows, ...] from noise that training has not seen."""
    unseen = Draw.for_images(DRAW_SEED + 1, np.arange(rows))
    return sample(method.student, schedule, batch(rows, classes).cond, unseen, method.student.row_shape)


def gaussian_wasserstein2(points: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """W2 between the Gaussian fitted to `points` [n, dim] and N(mean, covariance), exact.

    W2^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C2^1/2 C1 C2^1/2)^1/2)
    """
    points, mean, covariance = points.double(), mean.double(), covariance.double()
    seen = points.T.cov(correction=0).reshape(covariance.shape)
    root = _root(covariance)
    cross = _root(root @ seen @ root)
    square = ((points.mean(0) - mean) ** 2).sum() + (seen + covariance - 2 * cross).trace()
    return math.sqrt(max(square.item(), 0.0))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def sliced_wasserstein2(a: Tensor, b: Tensor, slices: int = 64) -> float:
    """W2 between two point sets [n, dim] of equal size: sqrt(dim * mean over directions of the squared W2 on a line).

    Equal to W2 when one set is the other one moved; the one-dimensional W2 pairs sorted values.
    """
    directions = torch.randn(a.shape[1], slices, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    gap = (a.double() @ directions).sort(0)[0] - (b.double() @ directions).sort(0)[0]
    # sum of squared direction cosines over the slices, in place of their expectation slices / dim
    return math.sqrt(a.shape[1] * gap.square().mean().item())
