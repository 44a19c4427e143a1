"""Tiny Stable Diffusion pipelines with random weights, as a stock pipeline folder on disk: 16 pixels, 8x8 latents."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["sd15", "sd21", "sdxl"]
KINDS: tuple[Kind, ...] = ("sd15", "sd21", "sdxl")

# abar ends at .033, so that (x - s e) / a stays tame for a random network.
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.0075,
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL: dict[str, Any] = {
    "cross_attention_dim": 32,  # of two encoders
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
WORDS, LENGTH = 16, 12  # width of text states; tokens a prompt


def tiny_sd(folder: Path, kind: Kind = "sd15", seed: int = 0) -> Path:
    """Writes a pipeline that `DiffusionPipeline.from_pretrained` loads into `folder`, and gives `folder` back.

    sd15: eps-prediction, StableDiffusionPipeline. sd21: the same with v-prediction. sdxl: eps-prediction,
    StableDiffusionXLPipeline with two text encoders, pooled width 16, zeros for an empty negative prompt.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = _sdxl() if kind == "sdxl" else _sd("v_prediction" if kind == "sd21" else "epsilon")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _sd(prediction: str) -> Any:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet: Any = UNet2DConditionModel(**UNET)
    return StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=_text_encoder(projected=False),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet: Any = UNet2DConditionModel(**{**UNET, **SDXL})
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=_text_encoder(projected=False),
        text_encoder_2=_text_encoder(projected=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler("epsilon"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _scheduler(prediction: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULER, prediction_type=prediction)


def _vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling_factor,
    )


def _tokenizer() -> Any:
    """Printable characters, each alone and at the end of a word, and no merges."""
    import transformers
    from transformers import CLIPTokenizer

    characters = [c for c in string.printable if not c.isspace()]
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    if int(transformers.__version__.split(".")[0]) >= 5:
        return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)
    with tempfile.TemporaryDirectory() as place:  # earlier versions read files
        files = Path(place, "vocab.json"), Path(place, "merges.txt")
        files[0].write_text(json.dumps(vocab))
        files[1].write_text("#version: 0.2\n")
        return CLIPTokenizer(*map(str, files), model_max_length=LENGTH)


def _text_encoder(projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    count = 2 * sum(not c.isspace() for c in string.printable) + 2
    config = CLIPTextConfig(
        vocab_size=count,
        hidden_size=WORDS,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=WORDS,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)
