"""Pixel UNets: diffusers' UNet2DModel, with class labels or none, as a flow network or with a VP scheduler's table."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from .build import parse
from .family import DiffusionFamily, Facts, Loaded, settings
from .folder import path_from


class UNet2DConfig(BaseModel):
    """Sizes of a UNet2DModel. `classes` adds one embedding more, the null class; `path` is `{kind: flow | vp, ...}`."""

    model_config = ConfigDict(extra="forbid")
    sample_size: int
    channels: int = 1
    classes: int | None = None
    block_out_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 1
    attention: Literal["last", "none"] = "last"
    attention_head_dim: int = 16
    norm_num_groups: int = 8
    path: dict[str, Any] = {"kind": "flow"}


class UNet2DFamily(DiffusionFamily):
    """UNet2DModel: called (x, timestep, class_labels=); answers `sample`."""

    name = "unet2d"
    facts = Facts(
        pipeline="ConsistencyModelPipeline",
        component="unet",
        network="diffusers:UNet2DModel",
        lora={
            "default": ("to_q", "to_k", "to_v", "to_out.0"),
            "wide": ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"),
        },
        scalar_slot="class_labels",
        time_embedding="time_embedding",
        feature_layers=("mid_block",),
    )

    def build(self, **config: Any) -> Loaded:
        """A UNet2DModel with random weights."""
        from diffusers import UNet2DModel

        c = parse(UNet2DConfig, config, "unet2d build")
        depth = len(c.block_out_channels)
        last = "Attn" if c.attention == "last" else ""
        module: Any = UNet2DModel(
            sample_size=c.sample_size,
            in_channels=c.channels,
            out_channels=c.channels,
            block_out_channels=c.block_out_channels,
            layers_per_block=c.layers_per_block,
            down_block_types=("DownBlock2D",) + (f"{last}DownBlock2D",) * (depth - 1),
            up_block_types=(f"{last}UpBlock2D",) * (depth - 1) + ("UpBlock2D",),
            attention_head_dim=c.attention_head_dim,
            norm_num_groups=c.norm_num_groups,
            add_attention=c.attention == "last",
            num_class_embeds=None if c.classes is None else c.classes + 1,
        )
        return Loaded(module, self.name, path_from(c.path))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Labels go in as `class_labels`; a network without classes takes none."""
        labels = {"class_labels": cond["label"]} if settings(module).num_class_embeds is not None else {}
        return {"sample": x, "timestep": timestep, **labels}

    def null(self, module: nn.Module, cond: Cond) -> Cond:
        """The last embedding is the null class."""
        embeds = settings(module).num_class_embeds
        if embeds is None:
            raise UserError("this unet2d has no classes, so it has no unconditional branch: use guidance_scale 1")
        return cond.with_(label=cond["label"].new_full(cond["label"].shape, embeds - 1))

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[channels, size, size]"""
        c = settings(module)
        size = c.sample_size if not isinstance(c.sample_size, int) else (c.sample_size, c.sample_size)
        return (c.in_channels, *size)


UNET2D = UNet2DFamily()
