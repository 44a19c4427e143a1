"""LAION's aesthetic score: how much people liked the look of an image, whatever its prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .base import Asked, Reward
from .cosine import VIT_L_14, ImageTower, clip_model
from .heads import LinearChain, chain_state, widths_of
from .pixels import Pixels
from .weights import Published, WeightsSpec, filled, planning

HEAD = Published(
    "config.reward.aesthetic.from",
    None,
    "sa_0_4_vit_l_14_linear.pth of LAION-AI/aesthetic-predictor on GitHub, converted to safetensors",
)
CLIP = Published(
    "config.reward.aesthetic.clip",
    "openai/clip-vit-large-patch14",
    "`hf download openai/clip-vit-large-patch14 config.json model.safetensors`",
)
WIDTHS = (768, 1)


class AestheticSpec(WeightsSpec):
    """Options of `aesthetic`. `from` is the head: one linear layer, or the chain of the improved predictor."""

    clip: str | None = Field(default=None, description="folder or hub id of the CLIP ViT-L/14 that the head reads")


class Aesthetic(Reward):
    """R(x) = head(f / |f|) with f the image features of CLIP ViT-L/14; about 1 to 10. Prompts are not read."""

    name = "aesthetic"
    Config = AestheticSpec

    def __init__(self, spec: AestheticSpec):
        super().__init__()
        self.head = _head(HEAD.find(spec.source))
        self.tower = ImageTower(clip_model(CLIP.find(spec.clip), CLIP, VIT_L_14, spec.dtype))
        self.pixels = Pixels(self.tower.size)
        expected, given = self.head.layers[0].in_features, self.tower.visual_projection.out_features
        if expected != given:
            raise UserError(f"{CLIP.option}: the head reads {expected} features, this CLIP gives {given}: use ViT-L/14")

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """[rows]"""
        features = self.tower(self.pixels(images))
        return self.head(F.normalize(features.float(), dim=-1))


def _head(place: Path | None) -> LinearChain:
    if place is None or planning():
        return LinearChain(WIDTHS)
    state = chain_state(HEAD.read(place))
    try:
        widths = widths_of(state)
    except (KeyError, IndexError):
        raise UserError(f"{HEAD.option}: '{place}' holds no linear layers: give the head alone, not a CLIP") from None
    return filled(lambda: LinearChain(widths), state, torch.float32, HEAD.option)
