"""Laws of numbers in (0, 1), as recipes write them: `{kind: logit_normal, loc: 0.8}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .clocks import logit_normal

if TYPE_CHECKING:
    from ..draws import Draw


class Law(BaseModel):
    """uniform; logit_normal, sigmoid of N(loc, scale^2) (arXiv 2403.03206, section 3.1); mix, half the rows of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["uniform", "logit_normal", "mix"] = "uniform"
    loc: float = 0.0
    scale: float = Field(default=1.0, gt=0)

    def drawn(self, draw: Draw) -> Tensor:
        """[rows], from the addresses `flat`, `bell` and `mix` of `draw`."""
        if self.kind == "uniform":
            return draw.uniform("flat")
        bell = logit_normal(draw.normal("bell"), self.loc, self.scale)
        if self.kind == "logit_normal":
            return bell
        return torch.where(draw.choice("mix", 0.5), bell, draw.uniform("flat"))
