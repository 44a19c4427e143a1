"""Decoupled DMD set up for tests: on a tiny UNet, or on small networks of points."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.methods.base import Update
from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD
from fewstep.models.oracle import MLP
from fewstep.roles import RoleSpec, assemble
from tests.oracles.harness import seat

ROWS = 6


def assembled(sizes: dict, tune: str = "lora", **config) -> DecoupledDMD:
    """The method on a tiny UNet: adapters on one base, or three copies."""
    method = DecoupledDMD(DecoupledDMD.Config(**config))
    said = {"tune": tune, "lora": {"rank": 2, "targets": "all"}, "optimizer": {"lr": 1e-2}}
    specs = {r.key: RoleSpec(**said) for r in method.roles() if r.tune == "lora"}
    specs["teacher"] = RoleSpec(**{"from": "unet2d", "build": sizes})
    handles = assemble(method.roles(), specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values():
        for p in handle.trainable().values():  # away from "student = fake = teacher"
            p.data.add_(0.02 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def points(**config) -> DecoupledDMD:
    """The method on three small MLPs of points in the plane."""
    torch.manual_seed(0)
    method = DecoupledDMD(DecoupledDMD.Config(**config))
    nets = {name: MLP.build(classes=10).module for name in ("teacher", "student", "fake_score")}
    if "discriminator" in method.critics:
        nets["discriminator"] = nn.Module()
    return seat(method, {r.name: nets[r.name] for r in method.roles()})


def images(rows: int = ROWS, samples: bool = False) -> Batch:
    """Labels, and with `samples` images as well."""
    ids = torch.arange(rows)
    fields = {"x0": torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))} if samples else {}
    return Batch(ids, {"cond": Cond(label=ids % 10), **fields})


def draw(step: int, rows: int = ROWS) -> Draw:
    """The numbers of one step."""
    return Draw(5, step, np.arange(rows))


def only(method: DecoupledDMD, step: int, batch: Batch | None = None) -> Update:
    """The one update of a step."""
    (update,) = method.train_step(batch if batch is not None else images(), draw(step))
    return update
