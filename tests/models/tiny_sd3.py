"""Tiny Stable Diffusion 3 pipelines with random weights, as a stock pipeline folder on disk: 16 pixels, 8x8 latents."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .tiny_sd import WORDS, _text_encoder, _tokenizer

JOINT, T5_LENGTH = 32, 256  # width of prompt_embeds: of both CLIP encoders side by side, and of T5
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": JOINT,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 2 * WORDS,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def tiny_sd3(folder: Path, seed: int = 0) -> Path:
    """Writes a StableDiffusion3Pipeline that `from_pretrained` loads into `folder`, and gives `folder` back.

    Two CLIP encoders of width 16, T5 of width 32, flow with shift 3.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=loud(SD3Transformer2DModel(**TRANSFORMER)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_text_encoder(projected=True),
            tokenizer=_tokenizer(),
            text_encoder_2=_text_encoder(projected=True),
            tokenizer_2=_tokenizer(),
            text_encoder_3=_t5(),
            tokenizer_3=pieces("</s>"),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@torch.no_grad()
def loud(network: Any) -> Any:
    """A random network whose answers have about unit size and hang on time and prompt, as trained ones do."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            parameter.normal_(std=(2.0 if "embed" in name else 1.0) / fan**0.5)
    return network.eval()


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=128,
        d_model=JOINT,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def pieces(special: str, front: bool = False, words: Iterable[str] = ()) -> Any:
    """A fast tokenizer of printable characters and these whole words; token 1, `special`, goes in front or to the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if not c.isspace()]
    vocab = [("<pad>", 0.0), (special, 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in characters)]
    vocab += [(f"\u2581{word}", -1.0) for word in sorted(set(words))]
    made = Tokenizer(models.Unigram(vocab, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    single = f"{special} $A" if front else f"$A {special}"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(special, 1)])
    named = {"bos_token" if front else "eos_token": special, "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=T5_LENGTH * 8, **named)
