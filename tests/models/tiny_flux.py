"""Tiny FLUX.1 pipelines with random weights, as a stock pipeline folder on disk: 16 pixels, 8x8 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from .tiny_sd import WORDS, _text_encoder, _tokenizer
from .tiny_sd3 import JOINT, _t5, _vae, loud, pieces

CHANNELS = 4  # of latents
SIZE = {"height": 16, "width": 16}  # the stock pipeline draws 128 x 128 latents unless it is told
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": JOINT,
    "pooled_projection_dim": WORDS,
    "axes_dims_rope": (4, 4, 8),
}
# As the released pipelines have it: shifted by size, or not at all.
SCHEDULER: dict[str, dict[str, Any]] = {
    "dev": {"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True},
    "schnell": {"base_shift": 0.5, "max_shift": 1.15, "shift": 1.0, "use_dynamic_shifting": False},
}
Kind = Literal["dev", "schnell"]


def tiny_flux(folder: Path, kind: Kind = "dev", seed: int = 0) -> Path:
    """Writes a FluxPipeline that `DiffusionPipeline.from_pretrained` loads into `folder`, and gives `folder` back.

    CLIP of width 16, T5 of width 32. dev: guidance is an input of the network. schnell: it has no such input.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER[kind]),
            vae=_vae(),
            text_encoder=_text_encoder(projected=False),
            tokenizer=_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=pieces("</s>"),
            transformer=loud(FluxTransformer2DModel(**TRANSFORMER, guidance_embeds=kind == "dev")),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
