"""Class-conditional transformers: diffusers' DiTTransformer2DModel, on pixels or latents."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..data.batch import Cond
from .build import parse
from .family import DiffusionFamily, Facts, Loaded, settings
from .folder import path_from


class DiTConfig(BaseModel):
    """Sizes of a DiTTransformer2DModel. `learned_sigma` doubles the output channels; only the first half is used."""

    model_config = ConfigDict(extra="forbid")
    sample_size: int
    channels: int = 1
    classes: int
    patch_size: int = 2
    num_layers: int = 4
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    learned_sigma: bool = False
    path: dict[str, Any] = {"kind": "flow"}


class DiTFamily(DiffusionFamily):
    """DiTTransformer2DModel: called (hidden_states, timestep=, class_labels=). Held in eval mode: it drops labels in train mode."""

    name = "dit"
    facts = Facts(
        pipeline="DiTPipeline",
        component="transformer",
        network="diffusers:DiTTransformer2DModel",
        out_channels="half",
        step_generator=False,
        vae_norm="scale",
        lora={
            "default": ("to_q", "to_k", "to_v", "to_out.0"),
            "wide": ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "linear", "linear_1", "linear_2"),
        },
        time_embedding="transformer_blocks.*.norm1.emb.timestep_embedder",
        feature_layers=("transformer_blocks.1", "transformer_blocks.0"),
        train_dropout=True,
    )

    def build(self, **config: Any) -> Loaded:
        """A DiTTransformer2DModel with random weights."""
        from diffusers import DiTTransformer2DModel

        c = parse(DiTConfig, config, "dit build")
        module: Any = DiTTransformer2DModel(
            sample_size=c.sample_size,
            in_channels=c.channels,
            out_channels=c.channels * (2 if c.learned_sigma else 1),
            patch_size=c.patch_size,
            num_layers=c.num_layers,
            num_attention_heads=c.num_attention_heads,
            attention_head_dim=c.attention_head_dim,
            num_embeds_ada_norm=c.classes,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
        return Loaded(module, self.name, path_from(c.path))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Labels [rows] int64 and fractional timesteps."""
        return {"hidden_states": x, "timestep": timestep, "class_labels": cond["label"]}

    def null(self, module: nn.Module, cond: Cond) -> Cond:
        """diffusers' label embedding keeps one row more than there are classes."""
        return cond.with_(label=cond["label"].new_full(cond["label"].shape, settings(module).num_embeds_ada_norm))


DIT = DiTFamily()
