"""Lumina-Image 2.0: diffusers' Lumina2Transformer2DModel on VAE latents, with prompts.

The network's time runs the other way: it is fed 1 - t, and answers x0 - eps, so v = -output. A condition holds
`prompt_embeds` [rows, length, width] and `mask` [rows, length] (1 = text, 0 = padding after it).

Guidance is the usual linear one in v. The stock pipeline's also brings each row of pixels to the norm that it has without
(`cfg_normalization`, on unless it is told; `facts.guidance_rescale`), and can leave guidance out of the last steps
(`cfg_trunc_ratio`, off unless it is told). No schedule here does either.
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
from .build import parse
from .family import DiffusionFamily, Facts, Latent, Loaded, settings
from .flow_sizes import preset
from .folder import path_from
from .surroundings import PipelineSurroundings, borrowed

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
LABELS = 1000  # of t = 1, in the scheduler
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 2, 2),
        "cap_feat_dim": 16,
    },
    "2b": {},
}


class Lumina2Config(BaseModel):
    """Sizes of a Lumina2Transformer2DModel. `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(default=128, gt=0, multiple_of=2, description="of the latents that are drawn without data")
    in_channels: int = Field(default=16, gt=0)
    hidden_size: int = Field(default=2304, gt=0)
    num_layers: int = Field(default=26, gt=0, description="blocks that read text and picture as one")
    num_refiner_layers: int = Field(default=2, gt=0, description="blocks before those, for text and for the picture")
    num_attention_heads: int = Field(default=24, gt=0)
    num_kv_heads: int = Field(default=8, gt=0)
    multiple_of: int = Field(default=256, gt=0, description="that the width of feed-forward layers divides by")
    axes_dim_rope: tuple[int, int, int] = Field(default=(32, 32, 32), description="sum: width of a head")
    axes_lens: tuple[int, int, int] = Field(
        default=(300, 512, 512), description="places made for tokens, rows, columns"
    )
    cap_feat_dim: int = Field(default=2304, gt=0, description="width of prompt_embeds")
    shift: float = Field(default=6.0, gt=0, description="of the path's clock")
    around: str | None = Field(default=None, description="pipeline whose autoencoder and text encoder are used")

    def arguments(self) -> dict[str, Any]:
        """What Lumina2Transformer2DModel is made with."""
        return self.model_dump(exclude={"size", "shift", "around"})


class Lumina2Surroundings(PipelineSurroundings):
    """Gemma-2, told the pipeline's own system prompt before each prompt; no condition is the empty prompt without it."""

    pipeline = "Lumina2Pipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:AutoModel",
        "tokenizer": "transformers:AutoTokenizer",
    }
    absent = ()
    longest = 256

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds: last but one hidden states of system prompt and prompt; mask: where there is text."""
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(list(texts), False, device=self.device)
        return Cond(prompt_embeds=embeds, mask=mask)

    @torch.no_grad()
    def empty(self) -> Cond:
        """The negative prompt that the pipeline defaults to."""
        _, _, embeds, mask = self.text_pipeline().encode_prompt([""], True, device=self.device)
        return Cond(prompt_embeds=embeds, mask=mask)


class Lumina2Family(DiffusionFamily):
    """Lumina2Transformer2DModel: called (x, 1 - t, encoder_hidden_states=, encoder_attention_mask=); answers -v."""

    name = "lumina2"
    facts = Facts(
        pipeline="Lumina2Pipeline",
        component="transformer",
        network="diffusers:Lumina2Transformer2DModel",
        time_reversed=True,
        sign=-1,
        latent=Latent(channels=16, factor=8, patch=2, multiple=16, any_size=True),
        vae_norm="scale_shift",
        guidance_rescale="norm",
        null="empty_text",
        step_generator=False,
        lora_mixin="Lumina2LoraLoaderMixin",
        lora_prefix="transformer",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        time_embedding="time_caption_embed.timestep_embedder",
        # The picture alone, before text joins it: later layers answer rows of text and picture, of any length.
        feature_layers=("noise_refiner.1", "noise_refiner.0"),
    )

    def build(self, **config: Any) -> Loaded:
        """A Lumina2Transformer2DModel with random weights; around it, what `around` names."""
        from diffusers import Lumina2Transformer2DModel

        where = f"{self.name} build"
        c = parse(Lumina2Config, preset(SIZES, config, where), where)
        module: Any = Lumina2Transformer2DModel(**c.arguments())
        path = path_from({"kind": "flow", "shift": c.shift, "num_train_timesteps": LABELS})
        return Loaded(module, self.name, path, Lumina2Surroundings(borrowed(c.around), module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoder follow when they are asked for."""
        loaded = super().load(folder)
        return replace(loaded, around=Lumina2Surroundings(folder, loaded.module))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Text states with their mask, and the time from noise to picture."""
        return {
            "hidden_states": x,
            "timestep": 1 - timestep / LABELS,
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "encoder_attention_mask": _counted(cond["mask"]),
        }

    def unpack(self, module: nn.Module, output: Any, x: Tensor) -> Tensor:
        """v, which is what the network answers with the other sign."""
        return -super().unpack(module, output, x)

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        return Cond(prompt_embeds=torch.zeros(1, 1, settings(module).cap_feat_dim), mask=torch.ones(1, 1).long())


def _counted(mask: Tensor) -> Tensor:
    """`mask`, whose ones the network counts; where a plan has no numbers, one that is full."""
    return torch.ones(mask.shape, dtype=mask.dtype, device="cpu") if mask.is_meta else mask


LUMINA2 = Lumina2Family()
