"""Latent networks of any size that read patches of 2 x 2: what Qwen-Image and FLUX.1 have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .family import DiffusionFamily, settings

SIDE = 128  # of the latents that the pipelines draw unless they are told a size


class PatchedFamily(DiffusionFamily):
    """The network answers in patches, has `in_channels` of a patch, and takes any size; its prompts take a pipeline."""

    def unpack(self, module: nn.Module, output: Any, x: Tensor) -> Tensor:
        """The network's answer as latents."""
        return latents(super().unpack(module, output, x), x.shape[2:])

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """The data's, or without data those that the pipeline draws."""
        return getattr(module, "latent_shape", (settings(module).in_channels // 4, SIDE, SIDE))


def patches(x: Tensor) -> Tensor:
    """Latents [rows, c, h, w] as [rows, h w / 4, 4 c]: a patch's 2 x 2 latents by channel, then row, then column."""
    rows, channels, height, width = x.shape
    cut = x.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // 4, 4 * channels)


def latents(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `patches` for latents of `size` (h, w)."""
    (rows, _, channels), (height, width) = tokens.shape, size
    cut = tokens.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)
