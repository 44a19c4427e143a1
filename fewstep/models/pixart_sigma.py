"""PixArt-Sigma: diffusers' PixArtTransformer2DModel on VAE latents, with prompts.

A condition holds `prompt_embeds` [rows, length, width] of T5 and `mask` [rows, length] (1 = text, 0 = padding). The second
half of the network's channels is a learned variance, which few-step samplers do not read. Networks that are told size and
aspect ratio besides (PixArt-alpha of 1024 pixels) are no part of this family.

No stock LoRA loader knows this class: adapters are exported merged, and beside it in peft's layout.
"""

from __future__ import annotations

import inspect
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

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = ("ff.net.0.proj", "ff.net.2")
TABLE = {"kind": "vp", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
FIRST_NAME = "Transformer2DModel"  # of the class, in configs that were published before it had one of its own
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_channels": 32,
    },
    "xl": {},
}


class PixArtSigmaConfig(BaseModel):
    """Sizes of a PixArtTransformer2DModel. `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(default=128, gt=0, multiple_of=2, description="of the latents")
    in_channels: int = Field(default=4, gt=0)
    num_layers: int = Field(default=28, gt=0)
    num_attention_heads: int = Field(default=16, gt=0)
    attention_head_dim: int = Field(default=72, gt=0)
    caption_channels: int = Field(default=4096, gt=0, description="width of prompt_embeds")
    interpolation_scale: int | None = Field(default=None, gt=0, description="of places; None: one for each 64 latents")
    learned_sigma: bool = Field(default=True, description="a second half of channels, which is not used")
    around: str | None = Field(default=None, description="pipeline whose autoencoder and text encoder are used")

    def arguments(self) -> dict[str, Any]:
        """What PixArtTransformer2DModel is made with."""
        said = self.model_dump(exclude={"size", "learned_sigma", "around"})
        return said | {
            "out_channels": self.in_channels * (2 if self.learned_sigma else 1),
            "cross_attention_dim": self.num_attention_heads * self.attention_head_dim,
            "use_additional_conditions": False,
        }


class PixArtSigmaSurroundings(PipelineSurroundings):
    """T5; no condition is the empty prompt."""

    pipeline = "PixArtSigmaPipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:T5EncoderModel",
        "tokenizer": "transformers:AutoTokenizer",
    }
    absent = ()
    longest = 300

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds and mask of 300 tokens, of texts in small letters, cleaned where the pipeline would clean them."""
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(
            list(texts), False, device=self.device, clean_caption=self._cleans()
        )
        return Cond(prompt_embeds=embeds, mask=mask)

    def _cleans(self) -> bool:
        """What the pipeline's call defaults to, which takes two packages; without them it does not clean, and says so."""
        from diffusers.utils import import_utils

        said = inspect.signature(type(self.text_pipeline()).__call__).parameters["clean_caption"].default
        return said and import_utils.is_bs4_available() and import_utils.is_ftfy_available()


class PixArtSigmaFamily(DiffusionFamily):
    """PixArtTransformer2DModel: called (x, k, encoder_hidden_states=, encoder_attention_mask=); answers eps and a variance."""

    name = "pixart_sigma"
    facts = Facts(
        pipeline="PixArtSigmaPipeline",
        component="transformer",
        network="diffusers:PixArtTransformer2DModel",
        out_channels="half",
        latent=Latent(channels=4, factor=8, patch=2, multiple=16, any_size=True),
        vae_norm="scale",
        null="empty_text",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        # Before the shared AdaLN linear, so that the modulation of all blocks and the last norm see what joins here.
        time_embedding="adaln_single.emb.timestep_embedder",
        feature_layers=("transformer_blocks.1", "transformer_blocks.0"),  # every size has these
    )

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Also by the class's first name; networks that are told size and aspect ratio are others."""
        names = (self.facts.network.split(":")[1], FIRST_NAME)
        if config.get("_class_name") not in names or config.get("norm_type", "ada_norm_single") != "ada_norm_single":
            return False
        told = config.get("use_additional_conditions")
        return not (config.get("sample_size") == 128 if told is None else told)

    def build(self, **config: Any) -> Loaded:
        """A PixArtTransformer2DModel with random weights; around it, what `around` names."""
        from diffusers import PixArtTransformer2DModel

        where = f"{self.name} build"
        c = parse(PixArtSigmaConfig, preset(SIZES, config, where), where)
        module: Any = PixArtTransformer2DModel(**c.arguments())
        return Loaded(module, self.name, path_from(TABLE), PixArtSigmaSurroundings(borrowed(c.around), module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoder follow when they are asked for.

        UserError for PixArt-alpha, whose network may look the same.
        """
        loaded = super().load(folder)
        around = PixArtSigmaSurroundings(folder, loaded.module)
        if around.index().get("_class_name") == "PixArtAlphaPipeline":
            raise UserError(f"'{folder}' is PixArt-alpha, which reads 120 tokens, not 300: give a PixArt-Sigma folder")
        return replace(loaded, around=around)

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Text states with their mask, and no size."""
        return {
            "hidden_states": x,
            "timestep": timestep,
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "encoder_attention_mask": cond["mask"],
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        return Cond(prompt_embeds=torch.zeros(1, 1, settings(module).caption_channels), mask=torch.ones(1, 1).long())


PIXART_SIGMA = PixArtSigmaFamily()
