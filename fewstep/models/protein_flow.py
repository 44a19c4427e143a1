"""Flow models of protein backbones: CA coordinates in nanometres, chains padded to one length and masked.

A condition holds `mask` [rows, residues], true for residues, and maybe `cath` [rows, 3] (fold labels, 0 = not known),
`x_self` [rows, residues, 3] (a clean chain predicted before) and `broken` [rows, residues] (after which residues some are
missing). Noise and chains have their centre of mass at 0 and are 0 in padding: `project` sees to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from ..maths.log_path import LogFlowPath
from .build import parse
from .family import DiffusionFamily, Facts, Loaded, settings
from .flow_sizes import preset

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {},
    "small": {"width": 256, "num_layers": 8, "num_heads": 8, "pair_width": 64, "registers": 4, "cond_width": 256},
}


class ProteinFlowConfig(BaseModel):
    """Sizes of the network; `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    width: int = Field(default=96, gt=0)
    num_layers: int = Field(default=4, gt=0)
    num_heads: int = Field(default=4, gt=0)
    pair_width: int = Field(default=32, gt=0)
    registers: int = Field(default=2, ge=0)
    index_width: int = Field(default=64, gt=2)
    time_width: int = Field(default=64, gt=2)
    cond_width: int = Field(default=128, gt=0)
    cath_classes: tuple[int, ...] = ()
    self_conditioning: bool = True
    window: int = Field(default=3, ge=1, description="neighbours on either side that a residue sees")


class ProteinFlowFamily(DiffusionFamily):
    """ProteinFlowTransformer: called (x, tau, mask, cath=, x_self=, broken=) with tau = 1 - t; answers data - noise = -v."""

    name = "protein_flow"
    facts = Facts(
        pipeline="FewStepProteinPipeline",
        component="transformer",
        network="fewstep_pipelines:ProteinFlowTransformer",
        time_reversed=True,
        sign=-1,
        null="class",
        lora={"default": ("qkv", "out"), "wide": ("qkv", "out", "gate", "up", "down", "pair_bias")},
        time_embedding="condition",
        feature_layers=("norm",),
    )

    def build(self, **config: Any) -> Loaded:
        """A network with random weights that answers 0."""
        from fewstep_pipelines import ProteinFlowTransformer

        where = "protein_flow build"
        c = parse(ProteinFlowConfig, preset(SIZES, config, where), where)
        module: Any = ProteinFlowTransformer(**c.model_dump(exclude={"size"}))
        return Loaded(module, self.name, LogFlowPath())

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """tau = 1 - t, the mask, and what else the condition says."""
        others = {name: cond[name] for name in ("cath", "x_self", "broken") if name in cond}
        return {"x": x, "tau": 1 - timestep, "mask": cond["mask"], **others}

    def unpack(self, module: nn.Module, output: Any, x: Tensor) -> Tensor:
        """v = -u."""
        return -output

    def null(self, module: nn.Module, cond: Cond) -> Cond:
        """No fold class known. UserError for a network without fold classes."""
        if not settings(module).cath_classes:
            raise UserError("this protein network knows no fold classes, so it cannot be guided: use guidance_scale 1")
        return cond.with_(cath=torch.zeros(len(cond["mask"]), 3, dtype=torch.long, device=cond["mask"].device))

    def blank(self, module: nn.Module) -> Cond:
        """A chain of eight residues."""
        return Cond(mask=torch.ones(1, 8, dtype=torch.bool))

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[8, 3]: a length is said by each condition, see `shape`."""
        return (8, 3)

    def shape(self, module: nn.Module, cond: Cond) -> tuple[int, ...]:
        """[residues, 3], padding counted."""
        return (cond["mask"].shape[1], 3)

    def lengths(self, cond: Cond) -> Tensor:
        """Residues of each chain [rows]."""
        return cond["mask"].sum(1)

    def project(self, x: Tensor, cond: Cond) -> Tensor:
        """Each chain's centre of mass to 0, and padding to 0."""
        return centred(x, cond["mask"])

    def mean_rows(self, x: Tensor, cond: Cond) -> Tensor:
        """Mean over residues and axes."""
        mask = cond["mask"].to(x)
        return (x * mask[..., None]).flatten(1).sum(1) / (x.shape[-1] * mask.sum(1)).clamp_min(1)


def centred(x: Tensor, mask: Tensor) -> Tensor:
    """x [rows, residues, axes] with mean 0 over the residues of `mask` [rows, residues], and 0 elsewhere."""
    weight = mask.to(x)[..., None]
    mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return (x - mean) * weight


PROTEIN_FLOW = ProteinFlowFamily()
