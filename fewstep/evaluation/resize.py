"""How images reach Inception's 299 x 299: three chains in use, whose scores differ by points and are never mixed.

    torch-fidelity   TensorFlow 1's bilinear (corners at the origin, no antialiasing), then (x - 128) / 128
    clean            antialiased bicubic in float, cut to [0, 255], not rounded (clean-fid's `clean`), then (x - 128) / 128
    legacy           bilinear about pixel centres, no antialiasing (pytorch-fid), then x / 127.5 - 1

clean-fid's `legacy_tensorflow` resizes as `torch-fidelity` does. All three are linear and act on each axis alone, so a
chain is a matrix of weights an axis: y = A_h x A_w^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UserError, nearest

SIDE = 299


@dataclass(frozen=True)
class Chain:
    """weights: from a side's length n to the matrix [299, n]. Pixels x in [0, 255] become (x - centre) / spread."""

    weights: Callable[[int], Tensor]
    centre: float
    spread: float


def resized(images: Tensor, chain: str) -> Tensor:
    """Network input, float32 [n, C, 299, 299], of uint8 images [n, C, H, W]. UserError for an unknown chain."""
    rule = chain_named(chain)
    rows, columns = (axis_weights(chain, side).to(images.device) for side in images.shape[-2:])
    pixels = rows @ (images.float() @ columns.T)
    return (pixels.clamp(0, 255) - rule.centre) / rule.spread


def chain_named(name: str) -> Chain:
    """The chain of that name; UserError with the nearest one."""
    if name not in CHAINS:
        raise UserError(f"unknown resize chain '{name}': {nearest(name, CHAINS)}")
    return CHAINS[name]


@lru_cache(maxsize=32)
def axis_weights(chain: str, n: int) -> Tensor:
    """[299, n]: the weights of n pixels in each of 299; a row sums to 1."""
    return chain_named(chain).weights(n)


def _corner_bilinear(n: int) -> Tensor:
    """Pixel i of the result lies at i n / 299 of the source, and the last source pixel goes on for ever."""
    # TensorFlow computes the position in float32, and a position off by one rounding takes another pair of pixels
    at = torch.arange(SIDE, dtype=torch.float32) * (n / SIDE)
    low = at.long()
    share = at - low
    weights, rows = torch.zeros(SIDE, n), torch.arange(SIDE)
    weights[rows, low] += 1 - share
    weights[rows, (low + 1).clamp(max=n - 1)] += share
    return weights


def _interpolation(n: int, mode: str, antialias: bool, dtype: torch.dtype) -> Tensor:
    """A linear resize, written out by what it makes of unit pixels. dtype: that of the original's weights."""
    unit = torch.eye(n, dtype=dtype)[None, None]
    made = torch.nn.functional.interpolate(unit, (SIDE, n), mode=mode, antialias=antialias, align_corners=False)
    return made[0, 0].float()


CHAINS = {
    "torch-fidelity": Chain(_corner_bilinear, 128, 128),
    "clean": Chain(lambda n: _interpolation(n, "bicubic", True, torch.float64), 128, 128),
    "legacy": Chain(lambda n: _interpolation(n, "bilinear", False, torch.float32), 127.5, 127.5),
}
