"""Tiny Wan 2.1 pipelines with random weights, as a stock pipeline folder on disk: 9 frames of 16 x 32, latents 3 x 4 x 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .tiny_sd3 import loud, pieces

WORDS, CHANNELS, LENGTH, SHIFT = 16, 4, 512, 3.0  # width of text states; of latents; tokens a prompt; of the scheduler
SHAPE = (CHANNELS, 3, 4, 8)
SIZE = {"num_frames": 9, "height": 16, "width": 32}
TRANSFORMER: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": WORDS,
    "freq_dim": 32,
    "ffn_dim": 32,
}


def tiny_wan(folder: Path, seed: int = 0) -> Path:
    """Writes a WanPipeline that `from_pretrained` loads into `folder`, and gives `folder` back.

    UMT5 of width 16, 4 pixels a latent in height and width and 4 frames in time, UniPC with shift 3 as it is released.
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": SHIFT}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = WanPipeline(
            tokenizer=pieces("</s>"),
            text_encoder=_umt5(),
            vae=_vae(),
            scheduler=UniPCMultistepScheduler(**flow),
            transformer=loud(WanTransformer3DModel(**TRANSFORMER)),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.3 * i - 0.4 for i in range(CHANNELS)],
        latents_std=[1 + 0.5 * i for i in range(CHANNELS)],
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )


def _umt5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=128,
        d_model=WORDS,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)
