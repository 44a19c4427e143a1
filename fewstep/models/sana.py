"""SANA: diffusers' SanaTransformer2DModel on the latents of a deep-compression autoencoder, with prompts.

A condition holds `prompt_embeds` [rows, length, width] and `mask` [rows, length] (1 = text, 0 = padding). Networks with
an embedded guidance (SANA-Sprint) are on another path and no part of this family.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Cond
from .build import parse
from .family import DiffusionFamily, Facts, Latent, Loaded, settings
from .flow_sizes import PATH, SANA_SIZES, SanaConfig, preset
from .folder import path_from
from .surroundings import PipelineSurroundings, borrowed

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = ("conv_inverted", "conv_point")  # of the feed-forward layers; their third convolution is depthwise


class SanaSurroundings(PipelineSurroundings):
    """Gemma-2, told the pipeline's own instruction before each prompt, and DC-AE, whose encoder is deterministic.

    No condition is the empty prompt without instruction.
    """

    pipeline = "SanaPipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderDC",
        "text_encoder": "transformers:AutoModel",
        "tokenizer": "transformers:AutoTokenizer",
    }
    absent = ()
    blocks, usual_factor = "encoder_block_out_channels", 32
    longest = 300

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds and mask of the instruction's first token and the prompt's tokens."""
        told = inspect.signature(type(self.text_pipeline()).__call__).parameters["complex_human_instruction"].default
        return self._encoded(texts, told)

    def empty(self) -> Cond:
        """The negative prompt that the pipeline defaults to."""
        return self._encoded([""], None)

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str], instruction: Sequence[str] | None) -> Cond:
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(
            list(texts), False, device=self.device, complex_human_instruction=instruction
        )
        return Cond(prompt_embeds=embeds, mask=mask)

    def _posterior(self, vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """A point: there is nothing to draw."""
        z = vae.encode(images, return_dict=False)[0]
        return z, torch.zeros_like(z)


class SanaFamily(DiffusionFamily):
    """SanaTransformer2DModel: called (x, 1000 t timestep_scale, encoder_hidden_states=, encoder_attention_mask=); answers v."""

    name = "sana"
    facts = Facts(
        pipeline="SanaPipeline",
        component="transformer",
        network="diffusers:SanaTransformer2DModel",
        latent=Latent(channels=32, factor=32, multiple=32, any_size=True),
        vae_norm="scale",
        null="empty_text",
        lora_mixin="SanaLoraLoaderMixin",
        lora_prefix="transformer",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        # Before the shared AdaLN linear, so that the modulation of all blocks and the last norm see what joins here.
        time_embedding="time_embed.emb.timestep_embedder",
        feature_layers=("transformer_blocks.1", "transformer_blocks.0"),  # every size has these
    )

    def holds(self, config: Mapping[str, Any]) -> bool:
        """SANA without an embedded guidance."""
        return super().holds(config) and not config.get("guidance_embeds")

    def build(self, **config: Any) -> Loaded:
        """A SanaTransformer2DModel with random weights; around it, what `around` names."""
        from diffusers import SanaTransformer2DModel

        where = f"{self.name} build"
        c = parse(SanaConfig, preset(SANA_SIZES, config, where), where)
        module: Any = SanaTransformer2DModel(**c.arguments())
        around = SanaSurroundings(borrowed(c.around), module)
        return Loaded(module, self.name, path_from({**PATH, "shift": c.shift}), around)

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoder follow when they are asked for."""
        loaded = super().load(folder)
        return replace(loaded, around=SanaSurroundings(folder, loaded.module))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Text states with their mask, and the label in the network's own unit."""
        return {
            "hidden_states": x,
            "timestep": timestep * settings(module).timestep_scale,
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "encoder_attention_mask": cond["mask"],
        }

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        return Cond(prompt_embeds=torch.zeros(1, 1, settings(module).caption_channels), mask=torch.ones(1, 1).long())


SANA = SanaFamily()
