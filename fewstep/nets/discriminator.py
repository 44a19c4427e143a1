"""Discriminator heads: from a denoiser's activations to one logit a row.

Heads are chosen by kind and by the shape of what they read. "conv": feature maps [rows, channels, height, width] get
convolutions, tokens [rows, tokens, width] are laid out as the square they came from, vectors [rows, width] get two
linear layers. "mean": the mean over places, and one linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest

if TYPE_CHECKING:
    from ..models.denoiser import Denoiser


class Discriminator(nn.Module):
    """One head a feature; the logit [rows] is the mean over heads.

        heads = Discriminator.reading(teacher, layers=("mid_block",))
        logits = heads(teacher.features(x, t, cond, ("mid_block",)))

    shapes: of one row of each feature. kind: a key of `KINDS`; another raises UserError.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], kind: str = "conv"):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"unknown discriminator heads '{kind}': {nearest(kind, KINDS)}")
        self.heads = nn.ModuleList(KINDS[kind][len(shape)](*shape) for shape in shapes)

    @classmethod
    @torch.no_grad()
    def reading(cls, denoiser: Denoiser, layers: tuple[str, ...] | None, kind: str = "conv") -> Discriminator:
        """Heads for these activations of a denoiser; a call on zeros tells the shapes."""
        x = torch.zeros(1, *denoiser.row_shape, device=denoiser.device)
        cond = denoiser.family.blank(denoiser.handle.module).to(x.device)
        features = denoiser.features(x, torch.full((1,), 0.5, device=x.device), cond, layers)
        return cls([feature.shape[1:] for feature in features], kind)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [rows] from features in the order of `shapes`."""
        logits = [head(feature).flatten(1).mean(1) for head, feature in zip(self.heads, features, strict=True)]
        return torch.stack(logits).mean(0)


class MapHead(nn.Sequential):
    """Stride-2 4x4 convolutions at constant width down to 4x4, one that spans the rest, a 1x1 to the logit.

    GroupNorm and SiLU after each, the head that DMD2 puts on the fake model's bottleneck (arXiv 2405.14867, appendix).
    """

    def __init__(self, channels: int, height: int, width: int):
        layers: list[nn.Module] = []
        while min(height, width) >= 8:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels), nn.SiLU()]
            height, width = height // 2, width // 2
        layers += [nn.Conv2d(channels, channels, (min(4, height), min(4, width)), stride=4), _norm(channels), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))


class TokenHead(nn.Sequential):
    """Tokens as a square map; a stride-2 4x4 convolution to half the width, GroupNorm, LeakyReLU(0.2), 1x1 to logits.

    The logits are averaged over places, the head that FastGen puts on a transformer's middle block.
    """

    def __init__(self, tokens: int, width: int):
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(
                f"{tokens} tokens are no square, which this discriminator reads: name other feature layers, or train without it"
            )
        half, kernel = max(1, width // 2), min(4, side)
        super().__init__(
            Square(side),
            nn.Conv2d(width, half, kernel, stride=2, padding=1 if kernel == 4 else 0),
            _norm(half),
            nn.LeakyReLU(0.2),
            nn.Conv2d(half, 1, 1),
        )


class VectorHead(nn.Sequential):
    """Linear, SiLU, linear: for networks on points."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))


class Square(nn.Module):
    """[rows, side * side, width] -> [rows, width, side, side]."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens as a map, row by row."""
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))


class MeanHead(nn.Module):
    """The mean over places of a map, of tokens or of a vector (which is its own), then a linear layer."""

    def __init__(self, *shape: int):
        super().__init__()
        self.places = {3: (2, 3), 2: (1,), 1: ()}[len(shape)]
        self.linear = nn.Linear(shape[-1] if len(shape) == 2 else shape[0], 1)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits [rows, 1]."""
        return self.linear(feature.mean(self.places) if self.places else feature)


KINDS: Mapping[str, Mapping[int, Callable[..., nn.Module]]] = {
    "conv": {3: MapHead, 2: TokenHead, 1: VectorHead},
    "mean": {3: MeanHead, 2: MeanHead, 1: MeanHead},
}


def _norm(channels: int) -> nn.GroupNorm:
    # At 1x1 a group is as many numbers as it has channels: with one, normalising would leave nothing.
    return nn.GroupNorm(math.gcd(32, channels, max(1, channels // 8)), channels)
