"""Stable Diffusion 3 and 3.5: diffusers' SD3Transformer2DModel on VAE latents, with prompts.

A condition holds `prompt_embeds` [rows, length, width], the two CLIP encoders' states side by side, padded to T5's width
and followed by T5's; and `pooled` [rows, width] of both CLIP encoders. There is no mask: padding is read like text, so
prompts always have the pipeline's own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Cond
from .build import parse
from .family import DiffusionFamily, Facts, Latent, Loaded, settings
from .flow_sizes import PATH, SD3_SIZES, StableDiffusion3Config, preset
from .folder import path_from
from .surroundings import PipelineSurroundings, borrowed

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2")


class StableDiffusion3Surroundings(PipelineSurroundings):
    """Two CLIP text encoders and T5; no condition is the empty prompt."""

    pipeline = "StableDiffusion3Pipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModelWithProjection",
        "text_encoder_2": "transformers:CLIPTextModelWithProjection",
        "text_encoder_3": "transformers:T5EncoderModel",
        "tokenizer": "transformers:CLIPTokenizer",
        "tokenizer_2": "transformers:CLIPTokenizer",
        "tokenizer_3": "transformers:AutoTokenizer",
    }

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds and pooled, as the pipeline makes them."""
        embeds, _, pooled, _ = self.text_pipeline().encode_prompt(
            list(texts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return Cond(prompt_embeds=embeds, pooled=pooled)


class StableDiffusion3Family(DiffusionFamily):
    """SD3Transformer2DModel: called (x, 1000 t, encoder_hidden_states=, pooled_projections=); answers v."""

    name = "stable_diffusion_3"
    facts = Facts(
        pipeline="StableDiffusion3Pipeline",
        component="transformer",
        network="diffusers:SD3Transformer2DModel",
        latent=Latent(channels=16, factor=8, patch=2, multiple=16),
        vae_norm="scale_shift",
        null="empty_text",
        step_generator=False,
        lora_mixin="SD3LoraLoaderMixin",
        lora_prefix="transformer",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        time_embedding="time_text_embed.timestep_embedder",
        # A block answers text and picture; this is the picture in it. Every size has these two blocks.
        feature_layers=("transformer_blocks.1.norm2", "transformer_blocks.0.norm2"),
    )

    def build(self, **config: Any) -> Loaded:
        """An SD3Transformer2DModel with random weights; around it, what `around` names."""
        from diffusers import SD3Transformer2DModel

        where = f"{self.name} build"
        c = parse(StableDiffusion3Config, preset(SD3_SIZES, config, where), where)
        module: Any = SD3Transformer2DModel(**c.arguments())
        path = path_from({**PATH, "shift": c.shift})
        return Loaded(module, self.name, path, StableDiffusion3Surroundings(borrowed(c.around), module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the VAE and the text encoders follow when they are asked for."""
        loaded = super().load(folder)
        return replace(loaded, around=StableDiffusion3Surroundings(folder, loaded.module))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Text states and the pooled text."""
        return {
            "hidden_states": x,
            "timestep": timestep,
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "pooled_projections": cond["pooled"].to(x),
        }

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token, and a pooled text."""
        c = settings(module)
        embeds, pooled = torch.zeros(1, 1, c.joint_attention_dim), torch.zeros(1, c.pooled_projection_dim)
        return Cond(prompt_embeds=embeds, pooled=pooled)


SD3 = StableDiffusion3Family()
