"""Stable Diffusion 1.5, 2.1 and XL: diffusers' UNet2DConditionModel on VAE latents, with prompts.

A condition holds `prompt_embeds` [rows, length, width], for XL also `pooled` [rows, width] and `time_ids` [rows, 6]
(original height and width, crop top and left, target height and width, in pixels). `guidance` [rows] is an input of
networks that have one (`time_cond_proj_dim`), embedded as the stock pipelines do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError, nearest
from .build import parse
from .family import DiffusionFamily, Facts, Latent, Loaded, settings
from .folder import path_from
from .stable_diffusion_sizes import (
    SD_SIZES,
    TABLE,
    XL_SIZES,
    StableDiffusionConfig,
    StableDiffusionXLConfig,
    unet_arguments,
)
from .surroundings import PipelineSurroundings

GUIDANCE_WIDTH = 256  # of the embedding, as in LCM (arXiv 2310.04378)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj")


class StableDiffusionSurroundings(PipelineSurroundings):
    """One CLIP text encoder; no condition is the empty prompt."""

    pipeline = "StableDiffusionPipeline"
    classes = {
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModel",
        "tokenizer": "transformers:CLIPTokenizer",
    }
    absent = ("safety_checker", "feature_extractor", "image_encoder")

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds: the text encoder's last hidden state, normalised."""
        embeds, _ = self.text_pipeline().encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)
        return Cond(prompt_embeds=embeds)

    def options(self) -> dict[str, Any]:
        """No safety checker."""
        return {"requires_safety_checker": False}


class StableDiffusionXLSurroundings(PipelineSurroundings):
    """Two CLIP text encoders; no condition is zeros, where the pipeline says so."""

    pipeline = "StableDiffusionXLPipeline"
    classes = {
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModel",
        "text_encoder_2": "transformers:CLIPTextModelWithProjection",
        "tokenizer": "transformers:CLIPTokenizer",
        "tokenizer_2": "transformers:CLIPTokenizer",
    }

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds: both encoders' last but one states side by side; pooled: the second's; time_ids: uncropped."""
        encoded = self.text_pipeline().encode_prompt(
            list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        height, width = (side * self.factor for side in _sides(self.module))
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)
        return Cond(prompt_embeds=encoded[0], pooled=encoded[2], time_ids=sizes.repeat(len(texts), 1))

    def null(self, cond: Cond) -> Cond:
        """Zeros for both text inputs, or the empty prompt when force_zeros_for_empty_prompt is off; the sizes stay."""
        if not self.options()["force_zeros_for_empty_prompt"]:
            return super().null(cond)
        return cond.with_(**{name: torch.zeros_like(cond[name]) for name in ("prompt_embeds", "pooled")})

    def options(self) -> dict[str, Any]:
        """As the folder's model_index.json says."""
        return {"force_zeros_for_empty_prompt": self.index().get("force_zeros_for_empty_prompt", True)}


class StableDiffusionFamily(DiffusionFamily):
    """UNet2DConditionModel: called (x, k, encoder_hidden_states=, timestep_cond=); answers `sample`."""

    name = "stable_diffusion"
    facts = Facts(
        pipeline="StableDiffusionPipeline",
        component="unet",
        network="diffusers:UNet2DConditionModel",
        latent=Latent(channels=4, factor=8, multiple=8),
        vae_norm="scale",
        null="empty_text",
        lora_mixin="StableDiffusionLoraLoaderMixin",
        lora_prefix="unet",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        scalar_slot="timestep_cond",
        time_embedding="time_embedding",
        feature_layers=("mid_block", "down_blocks.1", "down_blocks.0"),  # every size has these
    )
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = SD_SIZES
    config: ClassVar[type[StableDiffusionConfig]] = StableDiffusionConfig
    around: ClassVar[type[PipelineSurroundings]] = StableDiffusionSurroundings

    def holds(self, config: Mapping[str, Any]) -> bool:
        """XL differs from the others by its inputs only."""
        sizes_too = config.get("addition_embed_type") == "text_time"
        return super().holds(config) and sizes_too == issubclass(self.config, StableDiffusionXLConfig)

    def build(self, **config: Any) -> Loaded:
        """A UNet2DConditionModel with random weights and nothing around it."""
        from diffusers import UNet2DConditionModel

        size = config.get("size", "tiny")
        if size not in self.sizes:
            raise UserError(f"{self.name} build: unknown size '{size}': {nearest(str(size), self.sizes)}")
        c = parse(self.config, {**self.sizes[size], **config}, f"{self.name} build")
        module: Any = UNet2DConditionModel(**unet_arguments(c))
        path = path_from({**TABLE, "prediction_type": c.prediction_type})
        return Loaded(module, self.name, path, self.around(None, module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the VAE and the text encoders follow when they are asked for."""
        loaded = super().load(folder)
        return replace(loaded, around=self.around(folder, loaded.module))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Text states, and the embedded guidance when the network has that input and `cond` says one."""
        width = settings(module).time_cond_proj_dim
        embedded = guidance_embedding(cond["guidance"], width).to(x) if width and "guidance" in cond else None
        return {
            "sample": x,
            "timestep": timestep,
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "timestep_cond": embedded,
        }

    def upgrade(self, module: nn.Module, inputs: Sequence[str]) -> nn.Module:
        """Guidance alone: the stock class's own input, its projection zero; unchanged when there is one already.

        With others beside it, which the class has no place for, all go through `nets.extra_inputs` and fold on export.
        """
        if tuple(inputs) != ("guidance",):
            return super().upgrade(module, inputs)
        if settings(module).time_cond_proj_dim is None:
            embedding: Any = module.time_embedding
            first = embedding.linear_1
            embedding.cond_proj = _zero(GUIDANCE_WIDTH, first.in_features, first.weight)
            module.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)  # type: ignore[operator]
        return module

    def sealed(self, module: nn.Module) -> nn.Module:
        """A copy with a guidance input that does nothing: stock pipelines switch guidance off for such networks."""
        copied = self.upgrade(copy.deepcopy(module), ["guidance"])
        nn.init.zeros_(copied.time_embedding.cond_proj.weight)  # type: ignore[union-attr, arg-type]
        return copied

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        return Cond(prompt_embeds=torch.zeros(1, 1, settings(module).cross_attention_dim))

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[channels, height, width] of latents."""
        return (settings(module).in_channels, *_sides(module))


class StableDiffusionXLFamily(StableDiffusionFamily):
    """The same class, called with pooled text and picture sizes as well."""

    name = "stable_diffusion_xl"
    facts = replace(
        StableDiffusionFamily.facts,
        pipeline="StableDiffusionXLPipeline",
        null="zeros",
        lora_mixin="StableDiffusionXLLoraLoaderMixin",
    )
    sizes = XL_SIZES
    config = StableDiffusionXLConfig
    around = StableDiffusionXLSurroundings

    def blank(self, module: nn.Module) -> Cond:
        """With pooled text and sizes."""
        c = settings(module)
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        return super().blank(module).with_(pooled=torch.zeros(1, pooled), time_ids=torch.zeros(1, 6))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """With `text_embeds` and `time_ids`."""
        added = {"text_embeds": cond["pooled"].to(x), "time_ids": cond["time_ids"].to(x)}
        return super().pack(module, x, timestep, cond) | {"added_cond_kwargs": added}


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """[rows, width] float32 of usual guidance scales [rows]: sin then cos of 1000 (g - 1) f_i, f_i = 1e4^(-i / (width/2 - 1)).

    What stock pipelines feed as `timestep_cond` (arXiv 2210.03142, section 3, with diffusers' w = g - 1).
    """
    half = width // 2
    # At 1000 w a float32 rounding of w turns the sine by 5e-4, so w is what was meant, to six decimals.
    w = ((guidance.double() - 1) * 1e6).round() / 1e6
    frequency = torch.exp(torch.arange(half, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angle = (w.float() * 1000.0)[:, None] * frequency
    embedded = torch.cat([angle.sin(), angle.cos()], dim=1)
    return nn.functional.pad(embedded, (0, width % 2))


def _zero(features: int, out: int, like: Tensor) -> nn.Linear:
    layer = nn.Linear(features, out, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.weight)
    return layer


def _sides(module: nn.Module) -> tuple[int, int]:
    size = settings(module).sample_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


SD = StableDiffusionFamily()
SDXL = StableDiffusionXLFamily()
