"""Tiny SANA pipelines with random weights, as a stock pipeline folder on disk: 32 pixels, 8x8 latents."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from .tiny_sd3 import loud, pieces

WORDS, LENGTH = 16, 300  # width of text states; tokens a prompt, as the pipeline has them
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": WORDS,
}


def tiny_sana(folder: Path, seed: int = 0, timestep_scale: float = 1.0) -> Path:
    """Writes a SanaPipeline that `from_pretrained` loads into `folder`, and gives `folder` back.

    Gemma-2 of width 16, DC-AE with 4 pixels a latent, flow with shift 3. timestep_scale: as the network's config has it.
    """
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = SanaPipeline(
            tokenizer=pieces("<bos>", front=True, words=" ".join(told).split()),
            text_encoder=_gemma(),
            vae=_vae(),
            transformer=loud(SanaTransformer2DModel(**TRANSFORMER, timestep_scale=timestep_scale)),
            scheduler=DPMSolverMultistepScheduler(**flow),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae() -> Any:
    from diffusers import AutoencoderDC

    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8, 8, 16),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), ()),
        }.items()
    }
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **sides)


def _gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=512,
        hidden_size=WORDS,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Gemma2Model(config)
