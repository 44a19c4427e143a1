"""Latent networks of any size that read patches of 2 x 2: what Qwen-Image and FLUX.1 have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from .family import DiffusionFamily, settings

SIDE = 128  # of the latents that the pipelines draw unless they are told a size


class PatchedFamily(DiffusionFamily):
    """The network answers in patches, has `in_channels` of a patch, and takes any size; its prompts take a pipeline."""

    def unpack(self, module: nn.Module, output: Any, x: Tensor) -> Tensor:
        """The network's answer as latents."""
        return latents(super().unpack(module, output, x), x.shape[2:])

    def null(self, module: nn.Module, cond: Cond) -> Cond:
        """UserError: it takes the pipeline's text encoders."""
        raise UserError(f"a {self.name} network alone has no unconditional branch: load it from a pipeline folder")

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[channels, height, width] of latents: the data's, or without data those that the pipeline draws."""
        return getattr(module, "latent_shape", (settings(module).in_channels // 4, SIDE, SIDE))

    def fit(self, module: nn.Module, shape: Sequence[int] | None) -> None:
        """The network takes any size, so that of the data is remembered beside it."""
        if shape is not None:
            module.latent_shape = tuple(shape)  # type: ignore[assignment]


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
