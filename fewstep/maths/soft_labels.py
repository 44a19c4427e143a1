"""Soft labels of a classifier: compressed for storage and recovered for training.

Formats and recovery follow FKD (Shen, Xing; ECCV 2022, arXiv 2112.01528). p is a row of C class probabilities:

    ori                    all of p
    hard                   argmax p
    smoothing              (argmax, max) of p                = marginal_smoothing_k1
    marginal_smoothing_kK  the K largest; the missing mass is spread evenly over the other classes
    marginal_renorm_kK     the K largest, divided by their sum; 0 on the other classes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT = r"ori|hard|smoothing|marginal_(smoothing|renorm)_k[1-9][0-9]*"


@dataclass(frozen=True)
class LabelFormat:
    """What is stored of a row of probabilities: the `k` largest (None: all), as float16 when `half`.

    values: whether the probabilities themselves are stored. spread: the missing mass goes evenly to the other classes.
    """

    k: int | None
    values: bool = True
    spread: bool = False
    half: bool = False

    @classmethod
    def named(cls, name: str, half: bool = False) -> LabelFormat:
        """The format called `name`, one that matches `FORMAT`; ValueError for any other."""
        if not re.fullmatch(FORMAT, name):
            raise ValueError(f"no label format '{name}': {FORMAT}")
        if name == "ori":
            return cls(None, half=half)
        if name == "hard":
            return cls(1, values=False)
        k = int(name.rpartition("_k")[2]) if "_k" in name else 1
        return cls(k, spread="smoothing" in name, half=half)

    def pack(self, p: Tensor) -> dict[str, Tensor]:
        """Columns to store of probabilities [rows, C]: `indices` int32 [rows, k] and `values` [rows, k or C]."""
        dtype = torch.float16 if self.half else torch.float32
        if self.k is None:
            return {"values": p.to(dtype)}
        values, indices = p.topk(min(self.k, p.shape[-1]))
        packed = {"indices": indices.to(torch.int32)}
        return {**packed, "values": values.to(dtype)} if self.values else packed

    def recover(self, packed: Mapping[str, Tensor], classes: int) -> Tensor:
        """Probabilities [rows, classes] in float32 that sum to 1, whatever the rounding of what was stored."""
        if self.k is None:
            p = packed["values"].float()
            return p / p.sum(-1, keepdim=True)
        indices = packed["indices"].long()
        values = packed["values"].float() if self.values else torch.ones_like(indices, dtype=torch.float32)
        others = max(classes - indices.shape[-1], 1)
        rest = (
            (1 - values.sum(-1, keepdim=True)).clamp(min=0) / others if self.spread else torch.zeros_like(values[:, :1])
        )
        p = rest.repeat(1, classes).scatter(-1, indices, values)
        return p / p.sum(-1, keepdim=True)


def smooth_one_hot(label: Tensor, classes: int, eps: float) -> Tensor:
    """1 - eps on the label, eps / (C - 1) on every other class. label [rows] int64 -> [rows, classes] float32."""
    off = eps / max(classes - 1, 1)
    p = torch.full((len(label), classes), off, device=label.device)
    return p.scatter(-1, label[:, None], 1 - eps)
