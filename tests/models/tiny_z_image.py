"""Tiny Z-Image pipelines with random weights, as a stock pipeline folder on disk: 16 pixels, 8x8 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .tiny_qwen_image import _tokenizer
from .tiny_sd3 import _vae, loud

WORDS, CHANNELS = 16, 4  # width of text states; of latents
SIZE = {"height": 16, "width": 16}  # the stock pipeline draws 128 x 128 latents unless it is told
TRANSFORMER: dict[str, Any] = {
    "in_channels": CHANNELS,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": WORDS,
    "axes_dims": (8, 4, 4),
    "axes_lens": (1024, 32, 32),
}
# Qwen3's, less tools and history: told not to think, the answer begins with empty thoughts.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def tiny_z_image(folder: Path, shift: float = 3.0, seed: int = 0) -> Path:
    """Writes a ZImagePipeline that `DiffusionPipeline.from_pretrained` loads into `folder`, and gives `folder` back.

    Qwen3 of width 16, a tokenizer of single bytes, and an autoencoder with 2 pixels a latent. shift: 3 as Turbo's, 6 as
    the base's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        tokenizer.chat_template = CHAT
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=tokenizer,
            transformer=loud(ZImageTransformer2DModel(**TRANSFORMER)),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _text_encoder() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=300,
        hidden_size=WORDS,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=256,
    )
    return Qwen3Model(config)
