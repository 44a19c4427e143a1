"""Sizes of Stable Diffusion networks: what a recipe's `build:` may say, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TABLE = {"kind": "vp", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": (2, 2),
        "norm_num_groups": 4,
        "transformer_layers": (1, 0),
    },
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": (8, 8, 8, 8),
        "transformer_layers": (1, 1, 1, 0),
    },
    "sd21": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "transformer_layers": (1, 1, 1, 0),
        "linear_projection": True,
        "prediction_type": "v_prediction",
    },
}
XL_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {**SD_SIZES["tiny"], "cross_attention_dim": 32, "time_ids_width": 8, "pooled": 16},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers": (0, 2, 10),
        "time_ids_width": 256,
        "pooled": 1280,
    },
}


class StableDiffusionConfig(BaseModel):
    """Sizes of the UNet, by level from the finest. `size` names a row of SD_SIZES or XL_SIZES that the rest default to.

    transformer_layers: depth of each level's transformers, 0 = convolutions alone; the middle block always has one.
    """

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(gt=0, description="of the latents")
    block_out_channels: tuple[int, ...]
    layers_per_block: int = Field(default=2, gt=0)
    transformer_layers: tuple[int, ...]
    attention_head_dim: tuple[int, ...] = Field(description="heads a level, as diffusers' config names them")
    cross_attention_dim: int = Field(gt=0, description="width of prompt_embeds")
    norm_num_groups: int = 32
    linear_projection: bool = False
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class StableDiffusionXLConfig(StableDiffusionConfig):
    """The same with pooled prompts and picture sizes as inputs."""

    linear_projection: bool = True
    pooled: int = Field(gt=0, description="width of the pooled prompt")
    time_ids_width: int = Field(gt=0, description="embedding of each of the six sizes")


def unet_arguments(c: StableDiffusionConfig) -> dict[str, Any]:
    """What UNet2DConditionModel is made with."""
    attends = [depth > 0 for depth in c.transformer_layers]
    kinds = [("CrossAttn" if yes else "") for yes in attends]
    unet: dict[str, Any] = {
        "sample_size": c.sample_size,
        "block_out_channels": c.block_out_channels,
        "layers_per_block": c.layers_per_block,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "transformer_layers_per_block": tuple(max(1, depth) for depth in c.transformer_layers),
        "cross_attention_dim": c.cross_attention_dim,
        "attention_head_dim": c.attention_head_dim,
        "norm_num_groups": c.norm_num_groups,
        "use_linear_projection": c.linear_projection,
    }
    if isinstance(c, StableDiffusionXLConfig):
        unet["addition_embed_type"] = "text_time"
        unet["addition_time_embed_dim"] = c.time_ids_width
        unet["projection_class_embeddings_input_dim"] = c.pooled + 6 * c.time_ids_width
    return unet
