"""RG-LCD set up for tests: on points of the plane with a linear decoder, or on a tiny UNet of real digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.maths.paths import FlowPath, Path
from fewstep.methods.base import Update
from fewstep.methods.diffusion.rg_lcd import RGLCD
from fewstep.models.oracle import MLP
from fewstep.nets.latent_reward import LabelTower, LatentReward
from fewstep.rewards.base import Asked, Reward
from fewstep.roles import Handle, RoleSpec

ROWS = 6


class Mean(Reward):
    """R = slope * mean over pixels of image / 2 + 1/2: the mean of an image in 0..1."""

    name = "mean"

    def __init__(self, slope: float = 1.0, differentiable: bool = True):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope), requires_grad=False)
        self.differentiable = differentiable

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """[rows]."""
        return self.slope * (images / 2 + 0.5).flatten(1).mean(1)


class LinearDecoder:
    """A pipeline whose VAE is the matrix D: images [rows, 1, 2, 2] = latents [rows, 2] D / scale."""

    def __init__(self, scale: float = 0.5):
        self.matrix = nn.Parameter(torch.randn(2, 4, generator=torch.Generator().manual_seed(3)), requires_grad=False)
        self.scale, self.calls = scale, []

    def decode(self, latents: Tensor) -> Tensor:
        """[rows, 1, 2, 2]; remembers how many rows each call had."""
        self.calls.append(len(latents))
        return (latents / self.scale @ self.matrix).unflatten(1, (1, 2, 2))

    def null(self, cond: Cond) -> Cond:
        """Label 10."""
        return cond.with_(label=torch.full_like(cond["label"], 10))


def seat(
    method: RGLCD,
    networks: Mapping[str, nn.Module],
    path: Path | None = None,
    around: Any = None,
    specs: Mapping[str, RoleSpec] | None = None,
) -> RGLCD:
    """Gives every role its network: denoisers on points, the reward frozen, the proxy and the students tuned in full."""
    handles = {}
    for role in method.roles():
        shown = role.name not in ("reward", "proxy")
        module, tune = networks[role.name], "full" if role.tune == "full" else "frozen"
        module.requires_grad_(tune == "full")
        spec = (specs or {}).get(role.name, RoleSpec())
        family, on = ("mlp", path or FlowPath()) if shown else (None, None)
        handles[role.name] = Handle(role, module, spec, tune, family=family, path=on, around=around if shown else None)
    method.bind(handles, {}, {})
    return method


def points(reward: Reward | None = None, around: Any = None, ema: float | None = None, **config: Any) -> RGLCD:
    """The method on small MLPs of points in the plane, ten classes, unguided unless the config says otherwise."""
    torch.manual_seed(0)
    method = RGLCD(RGLCD.Config(**{"guidance_scale": 1.0, "reward": "linear", "levels": 8, **config}))
    names = [role.name for role in method.roles()]
    nets: dict[str, nn.Module] = {n: MLP.build(classes=10, width=16).module for n in ("teacher", "student", "plain")}
    nets["reward"] = reward if reward is not None else Mean()
    nets["proxy"] = LatentReward(nn.Linear(2, 8), LabelTower(10, 8))
    specs = {name: RoleSpec(ema=ema) for name in ("student", "plain")}
    return seat(method, {name: nets[name] for name in names}, around=around, specs=specs)


def rows(n: int = ROWS, scale: float = 1.0) -> Batch:
    """Points in the plane with labels."""
    ids = torch.arange(n)
    x0 = scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return Batch(ids, {"cond": Cond(label=ids % 10), "x0": x0})


def draw(step: int, n: int = ROWS) -> Draw:
    """The numbers of one step."""
    return Draw(5, step, np.arange(n))


def step(method: RGLCD, number: int = 0, batch: Batch | None = None) -> dict[str, Update]:
    """The updates of a step by the role they train; nothing is stepped."""
    batch = batch if batch is not None else rows()
    return {said.roles: said for said in method.train_step(batch, draw(number, len(batch)))}  # type: ignore[union-attr,misc]
