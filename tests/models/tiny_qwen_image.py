"""Tiny Qwen-Image pipelines with random weights, as a stock pipeline folder on disk: 16 pixels, 8x8 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .tiny_sd3 import loud

WORDS, CHANNELS = 16, 4  # width of text states; of latents
SIZE = {"height": 16, "width": 16}  # the stock pipeline draws 128 x 128 latents unless it is told
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4 * CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": WORDS,
    "axes_dims_rope": (8, 4, 4),
}
# As the released pipeline has it: shifted by size, and stretched so that the last level is .02.
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def tiny_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Writes a QwenImagePipeline that `DiffusionPipeline.from_pretrained` loads into `folder`, and gives `folder` back.

    Qwen2.5-VL of width 16, a tokenizer of single bytes, and an autoencoder with 2 pixels a latent.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            transformer=loud(QwenImageTransformer2DModel(**TRANSFORMER)),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    means = [0.3 * i - 0.4 for i in range(CHANNELS)]
    stds = [1 + 0.5 * i for i in range(CHANNELS)]
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=means,
        latents_std=stds,
    )


def _tokenizer() -> Any:
    """The 256 bytes by their printable names, no merges, and the special tokens of the chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(vocab=vocab, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:])})
    return made


def _text_encoder() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 300,
        "hidden_size": WORDS,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WORDS}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
    return Qwen2_5_VLForConditionalGeneration(config)
