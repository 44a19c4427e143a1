"""Sizes of text-to-image transformers on the flow path: what a recipe's `build:` may say, and the presets.

Fields are named as the configs of diffusers' classes name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError, nearest

PATH: Mapping[str, Any] = {"kind": "flow", "shift": 3.0}  # of SD3 (arXiv 2403.03206, 5.3.2) and SANA (arXiv 2410.10629)

SD3_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "sd3_medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192},
    "sd35_medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd35_large": {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
}
SANA_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "caption_channels": 16,
    },
    "600m": {
        "sample_size": 16,
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
    },
    "1600m": {
        "sample_size": 32,
        "num_layers": 20,
        "num_attention_heads": 70,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
    },
}


class StableDiffusion3Config(BaseModel):
    """Sizes of an SD3Transformer2DModel. `size` names a row of SD3_SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(default=128, gt=0, description="of the latents")
    in_channels: int = Field(default=16, gt=0)
    patch_size: int = Field(default=2, gt=0)
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(default=64, gt=0)
    joint_attention_dim: int = Field(default=4096, gt=0, description="width of prompt_embeds")
    pooled_projection_dim: int = Field(default=2048, gt=0, description="width of the pooled prompt")
    pos_embed_max_size: int = Field(gt=0, description="patches a side that positions are made for")
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: Literal["rms_norm"] | None = None
    shift: float = Field(default=PATH["shift"], gt=0, description="of the path's clock")
    around: str | None = Field(default=None, description="pipeline whose autoencoder and text encoders are used")

    def arguments(self) -> dict[str, Any]:
        """What SD3Transformer2DModel is made with."""
        said = self.model_dump(exclude={"size", "shift", "around"})
        width = self.num_attention_heads * self.attention_head_dim
        return said | {"out_channels": self.in_channels, "caption_projection_dim": width}


class SanaConfig(BaseModel):
    """Sizes of a SanaTransformer2DModel. `size` names a row of SANA_SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(gt=0, description="of the latents")
    in_channels: int = Field(default=32, gt=0)
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(default=32, gt=0)
    num_cross_attention_heads: int = Field(gt=0)
    cross_attention_head_dim: int = Field(gt=0)
    caption_channels: int = Field(default=2304, gt=0, description="width of prompt_embeds")
    mlp_ratio: float = Field(default=2.5, gt=0)
    qk_norm: Literal["rms_norm_across_heads"] | None = None
    timestep_scale: float = Field(default=1.0, gt=0, description="of the label that the network is fed")
    shift: float = Field(default=PATH["shift"], gt=0, description="of the path's clock")
    around: str | None = Field(default=None, description="pipeline whose autoencoder and text encoders are used")

    def arguments(self) -> dict[str, Any]:
        """What SanaTransformer2DModel is made with."""
        said = self.model_dump(exclude={"size", "shift", "around"})
        width = self.num_attention_heads * self.attention_head_dim
        return said | {"out_channels": self.in_channels, "cross_attention_dim": width}


def preset(sizes: Mapping[str, Mapping[str, Any]], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`said` on top of the row of `sizes` that it names; UserError when there is no such row."""
    size = said.get("size", "tiny")
    if size not in sizes:
        raise UserError(f"{where}: unknown size '{size}': {nearest(str(size), sizes)}")
    return {**sizes[size], **said}
