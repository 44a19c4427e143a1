"""Tiny Lumina-Image 2.0 pipelines with random weights, as a stock pipeline folder on disk: 64 pixels, 8x8 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .tiny_sana import WORDS, _gemma
from .tiny_sd3 import loud, pieces

LENGTH, SHIFT = 256, 6.0  # tokens a prompt, as the pipeline has them; of its scheduler
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on "
    "textual prompts or user prompts. <Prompt Start>"
)
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "axes_dim_rope": (4, 2, 2),
    "cap_feat_dim": WORDS,
}


def tiny_lumina2(folder: Path, seed: int = 0) -> Path:
    """Writes a Lumina2Pipeline that `from_pretrained` loads into `folder`, and gives `folder` back.

    Gemma-2 of width 16, flow with shift 6; 8 pixels a latent, which is a fixed number in the pipeline.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = Lumina2Pipeline(
            transformer=loud(Lumina2Transformer2DModel(**TRANSFORMER)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=_vae(),
            text_encoder=_gemma(),
            tokenizer=pieces("<bos>", front=True, words=SYSTEM.split()),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
