"""Handwritten digits that have to be found: each lies somewhere on a canvas of noise."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..draws import Draw, order
from .images import Digits, Images
from .source import SourceConfig

TRAIN = 1000  # of the 1,797 digits; the others are the test split


class DigitsOnCanvasConfig(SourceConfig):
    """`{source: digits_on_canvas, split: test}`."""

    split: Literal["train", "test"] = "train"
    size: int = Field(default=20, ge=8, description="side of the canvas")
    noise: float = Field(default=0.5, ge=0, le=1, description="the canvas is uniform in 0 .. noise, ink being 1")
    seed: int = Field(default=0, ge=0, description="of split, places and noise")


class DigitsOnCanvas(Images):
    """Real 8x8 digits, each pasted once, at a random place, onto its own canvas [1, size, size] of uniform noise.

    A pixel is the brighter of ink and noise. The split is stratified: 1,000 training and 797 test digits.
    """

    Config = DigitsOnCanvasConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        digits = Digits()
        assert digits.labels is not None
        ids = self._ids(digits.labels.numpy())
        ink = digits.pixels[ids, 0].float() / digits.top
        self.hold(self._paste(ink, ids)[:, None], digits.labels[ids], classes=10)

    def _ids(self, labels: np.ndarray) -> np.ndarray:
        """The split's digits: the first 1,000 when every class is dealt out evenly."""
        shuffled = order(self.config.seed, 0, len(labels), "digits_on_canvas")
        turn = np.empty(len(labels))
        for label in np.unique(labels):
            mine = shuffled[labels[shuffled] == label]
            turn[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
        dealt = np.argsort(turn, kind="stable")
        return np.sort(dealt[:TRAIN] if self.config.split == "train" else dealt[TRAIN:])

    def _paste(self, ink: Tensor, ids: np.ndarray) -> Tensor:
        """uint8 canvases [n, size, size]; digit i looks the same in either split."""
        size, side = self.config.size, ink.shape[-1]
        draw = Draw.for_images(self.config.seed, ids, scope="digits_on_canvas")
        canvas = draw.uniform("noise", size, size) * self.config.noise
        corner = draw.integers("corner", size - side + 1, 2)
        place = corner[:, :, None] + torch.arange(side)
        rows, columns = place[:, 0, :, None], place[:, 1, None, :]
        digit = torch.arange(len(ids))[:, None, None]
        canvas[digit, rows, columns] = torch.maximum(canvas[digit, rows, columns], ink)
        return (canvas * 255).round().to(torch.uint8)
