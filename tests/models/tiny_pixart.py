"""Tiny PixArt-Sigma pipelines with random weights, as a stock pipeline folder on disk: 16 pixels, 8x8 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .tiny_sd import _vae
from .tiny_sd3 import JOINT, _t5, loud, pieces

LENGTH = 300  # tokens a prompt, as the pipeline has them
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": JOINT,
    "use_additional_conditions": False,
}
# abar ends at .036, so that (x - s e) / a stays tame for a random network.
SCHEDULER: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.0065}


def tiny_pixart(folder: Path, seed: int = 0) -> Path:
    """Writes a PixArtSigmaPipeline that `from_pretrained` loads into `folder`, and gives `folder` back.

    T5 of width 32, eps-prediction with a learned variance.
    """
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = PixArtSigmaPipeline(
            tokenizer=pieces("</s>"),
            text_encoder=_t5(),
            vae=_vae(0.13025),
            transformer=loud(PixArtTransformer2DModel(**TRANSFORMER)),
            scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
