"""What a data source is: `fetch(ids)` gives rows, and nothing else happens.

A source holds no position, no shuffling and no generator. The trainer decides which ids come at a step, and hands over
the `Draw` from which augmentation takes its random numbers, so a resumed run sees the same rows.

    class Noise(Source):
        class Config(SourceConfig):
            count: int = 100

        def __len__(self): return self.config.count
        def fetch(self, ids, draw): return {"x0": ..., "cond": Cond()}
        def content_key(self): return digest(str(self.config.count))
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..models.build import parse

if TYPE_CHECKING:
    from ..draws import Draw


class SourceConfig(BaseModel):
    """What a recipe may write beside `source: NAME`. Subclasses add fields; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source:
    """Base of all sources. Subclasses set `Config` and write `__len__`, `fetch` and `content_key`.

    row_shape: shape of one row of `x0`, or None when there is none. classes: number of labels, or None.
    buckets: a number for every sample, int64 [N], when only samples of equal number can stand in one training batch.
    """

    Config: ClassVar[type[SourceConfig]] = SourceConfig
    row_shape: tuple[int, ...] | None = None
    classes: int | None = None
    buckets: Tensor | None = None

    def __init__(self, **config: Any):
        self.config: Any = parse(self.Config, config, f"source {type(self).__name__}")

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """Rows of the samples `ids` [n] (int64, 0..len-1, repeats allowed): field -> tensor or list with n rows.

        Every source gives `cond` (a `Cond`, maybe empty); images are `x0` [n, channels, height, width] in [-1, 1].
        draw: addressed random numbers for augmentation; None switches augmentation off.
        """
        raise NotImplementedError

    def heaviest(self, rows: int) -> Tensor:
        """Ids of `rows` samples that need as much memory as any."""
        return torch.arange(rows) % len(self)

    def content_key(self) -> str:
        """Hex digest of everything that decides what `fetch(ids, None)` returns; stores are keyed by it."""
        raise NotImplementedError


def digest(*parts: bytes | str) -> str:
    """sha256 over the parts, each with its length, so that ("ab", "c") and ("a", "bc") differ."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "little"))
        total.update(raw)
    return total.hexdigest()
