"""A reward that is linear in the image: its gradient is known, so what a method makes of it can be told in closed form."""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..errors import nearest
from .base import Asked, Reward, RewardSpec

PATTERNS = ("brightness", "checkerboard")


class LinearSpec(RewardSpec):
    """Options of `linear`."""

    direction: float | str = Field(default="brightness", description="a factor on the mean pixel, or a pattern's name")

    @field_validator("direction")
    @classmethod
    def _known(cls, direction: float | str) -> float | str:
        if isinstance(direction, str) and direction not in PATTERNS:
            raise ValueError(f"no such pattern: {nearest(direction, PATTERNS)}")
        return direction


class Linear(Reward):
    """R(x) = mean over elements of direction * x, so dR/dx = direction / (C H W) everywhere.

    direction: a number a (a times the mean pixel), "brightness" (a = 1), or "checkerboard" (+1 where row + column is
    even, -1 elsewhere: the highest frequency an image has).
    """

    name = "linear"
    Config = LinearSpec

    def __init__(self, spec: LinearSpec = LinearSpec()):  # noqa: B008  (frozen)
        super().__init__()
        self.pattern = spec.direction if isinstance(spec.direction, str) else "brightness"
        amount = 1.0 if isinstance(spec.direction, str) else spec.direction
        self.amount = nn.Parameter(torch.tensor(amount), requires_grad=False)

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """mean(direction * x), [rows]."""
        return (self.direction(images) * images.float()).flatten(1).mean(1)

    def direction(self, images: Tensor) -> Tensor:
        """What the images are multiplied with; broadcasts over them."""
        if self.pattern == "brightness":
            return self.amount
        row, column = (torch.arange(n, device=images.device) for n in images.shape[-2:])
        return self.amount * (1.0 - 2.0 * ((row[:, None] + column) % 2))
