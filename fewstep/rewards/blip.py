"""BLIP as ImageReward stores it (timm's ViT, a BERT that attends to it, a head), in transformers' classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .heads import LinearChain, chain_state, widths_of

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


@dataclass(frozen=True)
class Sizes:
    """Widths, depths and lengths; the defaults are those of ImageReward-v1.0 (BLIP ViT-L/16, BERT base)."""

    vision_width: int = 1024
    vision_layers: int = 24
    vision_hidden: int = 4096
    patch: int = 16
    image: int = 224
    text_width: int = 768
    text_layers: int = 12
    text_hidden: int = 3072
    vocabulary: int = 30524
    positions: int = 512
    head: tuple[int, ...] = (768, 1024, 128, 64, 16, 1)
    vision_heads: int = 16  # shapes do not tell the heads
    text_heads: int = 12

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Sizes:
        """Read off the shapes of a state under ImageReward's names; KeyError names what is missing."""
        shape = {name: tensor.shape for name, tensor in state.items()}
        patch, width = shape[f"{VISION}patch_embed.proj.weight"][-1], shape[f"{VISION}cls_token"][-1]
        vocabulary, text_width = shape[f"{TEXT}embeddings.word_embeddings.weight"]
        return cls(
            vision_width=width,
            vision_layers=_depth(shape, VISION, ".norm1.weight"),
            vision_hidden=shape[f"{VISION}blocks.0.mlp.fc1.weight"][0],
            patch=patch,
            image=patch * math.isqrt(shape[f"{VISION}pos_embed"][1] - 1),
            text_width=text_width,
            text_layers=_depth(shape, TEXT, ".attention.self.query.weight"),
            text_hidden=shape[f"{TEXT}encoder.layer.0.intermediate.dense.weight"][0],
            vocabulary=vocabulary,
            positions=shape[f"{TEXT}embeddings.position_embeddings.weight"][0],
            head=tuple(widths_of(chain_state(_under(state, HEAD)))),
        )


def _depth(shape: Mapping[str, Any], prefix: str, suffix: str) -> int:
    return sum(name.startswith(prefix) and name.endswith(suffix) for name in shape)


class BlipScore(nn.Module):
    """Head on the first token of a text encoder that reads the image by cross-attention: r [rows]."""

    def __init__(self, sizes: Sizes):
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            intermediate_size=sizes.vision_hidden,
            num_attention_heads=sizes.vision_heads,
            patch_size=sizes.patch,
            image_size=sizes.image,
            layer_norm_eps=1e-6,  # BLIP's own; transformers' default is 1e-5
        )
        text = BlipTextConfig(
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            num_hidden_layers=sizes.text_layers,
            intermediate_size=sizes.text_hidden,
            num_attention_heads=sizes.text_heads,
            vocab_size=sizes.vocabulary,
            max_position_embeddings=sizes.positions,
        )
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearChain(sizes.head)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """r [rows] of pixels [rows, 3, image, image] and tokens with their mask [rows, length]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return self.head(read[:, 0])


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's state under the names of `BlipScore`; parts of BLIP that make no score are left out."""
    vision = {f"vision.{_renamed(name)}": tensor for name, tensor in _under(state, VISION).items()}
    text = {f"text.{name}": tensor for name, tensor in _under(state, TEXT).items()}
    return {**vision, **text, **{f"head.{k}": v for k, v in chain_state(_under(state, HEAD)).items()}}


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
