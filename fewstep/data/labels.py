"""Class labels without samples, for methods whose student makes its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from .batch import Cond
from .source import Source, SourceConfig, digest

if TYPE_CHECKING:
    from ..draws import Draw


class LabelsConfig(SourceConfig):
    """`{source: labels, classes: 10}`."""

    classes: int = Field(gt=0)
    count: int = Field(default=50_000, gt=0, description="samples in one pass")


class Labels(Source):
    """Class labels alone: sample i has label i mod classes, so every class comes equally often."""

    Config = LabelsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.classes = self.config.classes

    def __len__(self) -> int:
        return self.config.count

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`cond.label` [n]."""
        return {"cond": Cond(label=torch.as_tensor(ids) % self.config.classes)}

    def content_key(self) -> str:
        """Digest of the two numbers."""
        return digest(f"labels {self.config.classes} {self.config.count}")
