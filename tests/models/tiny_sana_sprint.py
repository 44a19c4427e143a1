"""Tiny SANA-Sprint pipelines with random weights, as a stock pipeline folder on disk: 32 pixels, 8x8 latents."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from .tiny_sana import TRANSFORMER, _gemma, _vae
from .tiny_sd3 import loud, pieces

SPRINT: dict[str, Any] = {**TRANSFORMER, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}


def tiny_sana_sprint(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Writes a SanaSprintPipeline that `from_pretrained` loads into `folder`, and gives `folder` back.

    Gemma-2 of width 16, DC-AE with 4 pixels a latent. scheduler: what SCMScheduler is made with.
    """
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    told = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = SanaSprintPipeline(
            tokenizer=pieces("<bos>", front=True, words=" ".join(told).split()),
            text_encoder=_gemma(),
            vae=_vae(),
            transformer=loud(SanaTransformer2DModel(**SPRINT)),
            scheduler=SCMScheduler(**scheduler),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
