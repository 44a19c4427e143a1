"""The two protein methods on a tiny network that is not 0."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.data.batch import Batch, Cond
from fewstep.data.chains import Chains, masks
from fewstep.draws import Draw
from fewstep.methods.base import DiffusionMethod
from fewstep.roles import RoleSpec, assemble
from tests.pipelines.proteins import SIZES


def assembled(cls: type[DiffusionMethod], build: dict[str, Any] | None = None, **config: Any) -> Any:
    """The method with every role moved off where it began."""
    method = cls(cls.Config(**config))
    first = method.roles()[0].name
    specs = {first: RoleSpec.model_validate({"from": "protein_flow", "build": {**SIZES, "window": 2, **(build or {})}})}
    handles = assemble(method.roles(), specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values():
        for p in handle.module.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def lengths(*residues: int, most: int | None = None) -> Batch:
    """Chains of these lengths without coordinates, padded to `most`."""
    mask = masks(torch.tensor(residues), most or max(residues))
    return Batch(torch.arange(len(residues)), {"cond": Cond(mask=mask)})


def chains(rows: int = 4) -> Batch:
    """Real chains of 40 to 48 residues."""
    source = Chains(shortest=40, longest=48)
    return Batch(torch.arange(rows), source.fetch(torch.arange(rows), draw(rows=rows)))


def draw(step: int = 0, rows: int = 2) -> Draw:
    """The numbers of a step."""
    return Draw(0, step, range(rows), scope="train")
