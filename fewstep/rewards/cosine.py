"""Rewards that are the cosine between an image and its prompt: two towers, and what a CLIP folder holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Asked, Reward
from .pixels import Pixels
from .tokens import Tokenize
from .weights import Published, config_in, filled, planning

# sizes of published models, as transformers writes them; what is left out is transformers' default
VIT_L_14: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """a . b / (|a| |b|) over the last dimension, in float32 under any autocast: bf16 has steps of 1e-3 at 0.3."""
    with torch.autocast(a.device.type, enabled=False):
        return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1)


class Towers(nn.Module):
    """Image and text encoders into one space. size: side of the image in pixels. logit_scale: inverse temperature."""

    def __init__(self, size: int, logit_scale: float):
        super().__init__()
        self.size, self.logit_scale = size, logit_scale

    def image(self, pixels: Tensor) -> Tensor:
        """[rows, d] of standardised pixels [rows, 3, size, size]."""
        raise NotImplementedError

    def text(self, prompts: Sequence[str]) -> Tensor:
        """[rows, d]; long prompts are cut at the encoder's length."""
        raise NotImplementedError


class CosineReward(Reward):
    """R(x, c) = cos(image(x), text(c)), in [-1, 1]. Gradients reach the image; the prompt's side has none."""

    name = "clip"
    needs = "prompt"

    def __init__(self, towers: Towers):
        super().__init__()
        self.towers = towers
        self.pixels, self.logit_scale = Pixels(towers.size), towers.logit_scale

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """The cosine [rows]."""
        assert asked.prompts is not None
        with torch.no_grad():
            said = self.towers.text(list(asked.prompts))
        return cosine(self.towers.image(self.pixels(images)), said)


class ClipTowers(Towers):
    """The towers of a transformers `CLIPModel`."""

    def __init__(self, model: Any, tokenize: Tokenize | None):
        scale = 100.0 if model.logit_scale.is_meta else float(model.logit_scale.detach().float().exp())
        super().__init__(model.config.vision_config.image_size, scale)
        self.model, self.tokenize = model, tokenize

    def image(self, pixels: Tensor) -> Tensor:
        """Projection of the class token, [rows, d]."""
        pixels = pixels.to(self.model.visual_projection.weight.dtype)
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Projection of the end token, [rows, d]. Attention is causal, so the padding behind it changes nothing."""
        assert self.tokenize is not None
        ids = self.tokenize(prompts)["input_ids"].to(self.model.text_projection.weight.device)
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)


class ImageTower(nn.Module):
    """The image side of a transformers `CLIPModel`; the text side is let go."""

    def __init__(self, model: Any):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.size: int = model.config.vision_config.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Projection of the class token, [rows, d]."""
        pixels = pixels.to(self.visual_projection.weight.dtype)
        return self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)


def clip_model(place: Path | None, published: Published, sizes: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The CLIPModel of a transformers folder; without a place one of the published `sizes` and no weights."""
    from transformers import CLIPConfig, CLIPModel

    said = sizes if place is None else config_in(place, "clip", published.option)
    state = None if place is None or planning() else published.read(place)
    return filled(lambda: CLIPModel(CLIPConfig.from_dict(dict(said))), state, dtype, published.option)
