"""Images as CLIP-like judges want them, by steps that have a gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images CLIP was trained on, in [0, 1]; BLIP uses the same
STD = (0.26862954, 0.26130258, 0.27577711)


class Pixels(nn.Module):
    """[rows, 1 or 3, H, W] in [-1, 1] -> [rows, 3, size, size], standardised, in float32.

    What lies outside [-1, 1] is cut off, as in a saved picture: it has no gradient. Grey images are repeated. The shorter
    side is resized to `size` and the middle is cut out.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(fit(clamp((x + 1) / 2)) - mean) / std. UserError for other than 1 or 3 channels."""
        if images.shape[1] not in (1, 3):
            raise UserError(f"this reward sees pictures of 1 or 3 channels, not {images.shape[1]}: choose `linear`")
        unit = (images.float() / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        return (fit(unit, self.size) - self.mean) / self.std


def fit(images: Tensor, size: int) -> Tensor:
    """The middle [size, size] of images whose shorter side is resized to `size`.

    Bicubic (a = -1/2) with antialiasing, as Pillow does it, but without its rounding to whole grey levels.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (int(size * height / short), int(size * width / short))
    if shape != (height, width):
        images = F.interpolate(images, shape, mode="bicubic", antialias=True)
    top, left = (round((side - size) / 2) for side in shape)
    return images[..., top : top + size, left : left + size]
