"""Sizes of equal area for pictures of different shapes, so that little of a picture is cropped away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError

WIDEST = 2.0  # long side over short side: what SD XL was trained on lies almost all within


def bucket_sizes(size: int, multiple: int, widest: float = WIDEST) -> list[tuple[int, int]]:
    """(height, width) of all buckets: both multiples of `multiple`, height * width <= size^2 as nearly as they allow.

    The square comes first, then pairs (wide, high) of growing aspect, up to `widest`. No bucket is larger than the
    square, so that none needs more memory. UserError when `size` is no multiple.
    """
    if size % multiple:
        down = size - size % multiple
        raise UserError(
            f"size={size} is no multiple of {multiple}, as buckets need: choose {down or multiple}, or set `multiple`"
        )
    found = [(size, size)]
    for long in range(size + multiple, size * size + 1, multiple):
        short = size * size // long // multiple * multiple
        if long > widest * short:
            return found
        found += [(short, long), (long, short)]
    return found


def nearest_bucket(shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """For each picture (height, width) the number of the bucket whose log aspect is nearest, int64 [n].

    Of equally near ones the first.
    """
    aspects = torch.tensor([width / height for height, width in shapes], dtype=torch.float64).log()
    buckets = torch.tensor([width / height for height, width in sizes], dtype=torch.float64).log()
    return (aspects[:, None] - buckets).abs().argmin(1)
