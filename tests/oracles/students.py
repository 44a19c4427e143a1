"""Small networks of points that start as a mixture's velocity and are distilled by a method under test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.maths.paths import FlowPath
from fewstep.methods.base import DiffusionMethod
from tests.oracles.harness import batch, seat, train
from tests.oracles.ode_map import fitted, mixture


def true_samples(rows: int, seed: int = 11) -> Tensor:
    """Samples of the mixture [rows, 2]."""
    return mixture().data(torch.zeros(rows, dtype=torch.long), torch.Generator().manual_seed(seed))


def distilled_mixture(method: Any, steps: int = 2500, rows: int = 256) -> tuple[DiffusionMethod, float]:
    """The method with its MLP trained against the exact mixture, and the std of the data."""
    nets = {"teacher": mixture(), "student": fitted(mixture())}
    seat(method, {role.name: nets[role.name] for role in method.roles()}, FlowPath())
    generator, label = torch.Generator().manual_seed(3), torch.zeros(rows, dtype=torch.long)
    optimizer = torch.optim.Adam(method.student.module.parameters(), 1e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train(
        method,
        range(steps),
        lambda _: batch(rows, x0=mixture().data(label, generator)),
        {"student": optimizer},
        lambda *_: decay.step(),
    )
    return method, true_samples(20_000).std(0).mean().item()
