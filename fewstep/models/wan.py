"""Wan 2.1: diffusers' WanTransformer3DModel on latents of videos, with prompts.

States are latents [rows, channels, frames, height, width]: the first of them stands for one frame, each further one for
four. A condition holds `prompt_embeds` [rows, 512, width], zeros after a text's end. There is no mask: the zeros are read
like text, so prompts always have the pipeline's own length.

A network takes any number of frames and any size; without data it draws those of the stock pipeline. That of diffusers
0.36 cannot read prompts without the package ftfy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from .build import parse
from .family import DiffusionFamily, Facts, Latent, Loaded, settings
from .flow_sizes import preset
from .folder import path_from
from .surroundings import PipelineSurroundings, borrowed

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of both attentions, to the video and to the text
WIDE = ("ffn.net.0.proj", "ffn.net.2")
LABELS = 1000  # of t = 1, in the scheduler
DRAWN = (21, 60, 104)  # latents of 81 frames of 480 x 832, the pipeline's own
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_frames": 3,
        "sample_height": 4,
        "sample_width": 8,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "freq_dim": 32,
        "text_dim": 16,
    },
    "1.3b": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "14b": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
}


class WanConfig(BaseModel):
    """Sizes of a WanTransformer3DModel. `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_frames: int = Field(default=DRAWN[0], gt=0, description="of the latents that are drawn without data")
    sample_height: int = Field(default=DRAWN[1], gt=0, multiple_of=2, description="of those latents")
    sample_width: int = Field(default=DRAWN[2], gt=0, multiple_of=2, description="of those latents")
    in_channels: int = Field(default=16, gt=0)
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(default=128, gt=0, multiple_of=2)
    ffn_dim: int = Field(gt=0, description="width of feed-forward layers")
    freq_dim: int = Field(default=256, gt=0, description="sinusoids of the label")
    text_dim: int = Field(default=4096, gt=0, description="width of prompt_embeds")
    shift: float = Field(default=3.0, gt=0, description="of the path's clock: 3 for 480 pixels, 5 for 720")
    around: str | None = Field(default=None, description="pipeline whose autoencoder and text encoder are used")

    def arguments(self) -> dict[str, Any]:
        """What WanTransformer3DModel is made with."""
        drawn = {"sample_frames", "sample_height", "sample_width"}
        return self.model_dump(exclude={"size", "shift", "around", *drawn}) | {"out_channels": self.in_channels}


class WanSurroundings(PipelineSurroundings):
    """UMT5, and an autoencoder of videos [rows, 3, frames, height, width]; no condition is the empty prompt.

    An image [rows, 3, height, width] is encoded as a video of one frame.
    """

    pipeline = "WanPipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderKLWan",
        "text_encoder": "transformers:UMT5EncoderModel",
        "tokenizer": "transformers:AutoTokenizer",
    }
    absent = ("transformer_2",)  # of Wan 2.2
    pixels_at_once = 2**18  # of a frame: one video of 480 x 832 at a time
    blocks = "dim_mult"
    longest = 512  # tokens, as the pipeline's call has it

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds: the text encoder's last states, zeros after each text's end."""
        embeds, _ = self.text_pipeline().encode_prompt(
            list(texts), None, False, max_sequence_length=self.longest, device=self.device
        )
        return Cond(prompt_embeds=embeds)

    # Means and scales are one a channel [channels, 1, 1], so frames stand before channels wherever they are met.

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(z - mean) / std of videos, 4 n + 1 frames to n + 1; images are videos of one frame."""
        videos = images if images.ndim == 5 else images[:, :, None]
        return super().encode(videos, None if noise is None else noise.transpose(1, 2)).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Videos [rows, 3, frames, height, width] of latents."""
        return super().decode(latents.transpose(1, 2))

    def _posterior(self, vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._posterior(vae, images)
        return mean.transpose(1, 2), std.transpose(1, 2)

    def _pixels(self, vae: Any, z: Tensor) -> Tensor:
        return super()._pixels(vae, z.transpose(1, 2))


class WanFamily(DiffusionFamily):
    """WanTransformer3DModel: called (x, 1000 t, encoder_hidden_states=); answers v."""

    name = "wan"
    facts = Facts(
        pipeline="WanPipeline",
        component="transformer",
        network="diffusers:WanTransformer3DModel",
        latent=Latent(channels=16, factor=8, patch=2, multiple=16, frames=4, any_size=True),
        vae_norm="mean_std",
        null="empty_text",
        step_generator=False,
        lora_mixin="WanLoraLoaderMixin",
        lora_prefix="transformer",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        time_embedding="condition_embedder.time_embedder",
        feature_layers=("blocks.1", "blocks.0"),  # every size has these
    )

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Text to video: no input for a picture, which networks from image to video have besides."""
        alone = not config.get("image_dim") and config.get("in_channels", 16) == config.get("out_channels", 16)
        return super().holds(config) and alone

    def build(self, **config: Any) -> Loaded:
        """A WanTransformer3DModel with random weights; around it, what `around` names."""
        from diffusers import WanTransformer3DModel

        where = f"{self.name} build"
        c = parse(WanConfig, preset(SIZES, config, where), where)
        module: Any = WanTransformer3DModel(**c.arguments())
        self.fit(module, (c.in_channels, c.sample_frames, c.sample_height, c.sample_width))
        path = path_from({"kind": "flow", "shift": c.shift, "num_train_timesteps": LABELS})
        return Loaded(module, self.name, path, WanSurroundings(borrowed(c.around), module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoder follow when they are asked for. UserError for Wan 2.2."""
        said = WanSurroundings(folder, nn.Identity()).index()
        if said.get("boundary_ratio") is not None or said.get("expand_timesteps"):
            raise UserError(
                f"'{folder}' is Wan 2.2, which has two networks or a time for each token: give a folder of Wan 2.1"
            )
        loaded = super().load(folder)
        return replace(loaded, around=WanSurroundings(folder, loaded.module))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Text states; nothing else."""
        return {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": cond["prompt_embeds"].to(x)}

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        return Cond(prompt_embeds=torch.zeros(1, 1, settings(module).text_dim))

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[channels, frames, height, width] of latents: the data's, or without data those that the pipeline draws."""
        return getattr(module, "latent_shape", (settings(module).in_channels, *DRAWN))


WAN = WanFamily()
