"""Qwen-Image: diffusers' QwenImageTransformer2DModel on VAE latents, with prompts.

States are latents [rows, channels, height, width]; the network reads them in patches of 2 x 2, [rows, height width / 4,
4 channels], and t itself, a thousandth of the label. A condition holds `prompt_embeds` [rows, length, width] and `mask`
[rows, length] (1 = text, 0 = padding), so that texts of any lengths lie in one batch.

Guidance is the usual linear one in v. The stock pipeline, when it is given a negative prompt, also brings the guided
velocity of each patch to the norm of the conditional one (`facts.guidance_rescale`), which no schedule here does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import pad

from ..data.batch import Cond
from ..errors import UserError
from .build import parse
from .family import Facts, Latent, Loaded, settings
from .flow_sizes import preset
from .folder import path_from
from .patched import SIDE, PatchedFamily, patches
from .surroundings import PipelineSurroundings

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2")
OTHER_INPUTS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # of editing and layers
LABELS = 1000  # of t = 1, in the scheduler
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "in_channels": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    },
    "20b": {"num_layers": 60, "num_attention_heads": 24},
}


class QwenImageConfig(BaseModel):
    """Sizes of a QwenImageTransformer2DModel. `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(
        default=SIDE, gt=0, multiple_of=2, description="of the latents that are drawn without data"
    )
    in_channels: int = Field(default=64, gt=0, multiple_of=4, description="of a patch: four times those of the latents")
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(default=128, gt=0)
    joint_attention_dim: int = Field(default=3584, gt=0, description="width of prompt_embeds")
    axes_dims_rope: tuple[int, int, int] = Field(default=(16, 56, 56), description="sum: attention_head_dim")
    shift: float = Field(default=1.0, gt=0, description="of the path's clock")

    def arguments(self) -> dict[str, Any]:
        """What QwenImageTransformer2DModel is made with."""
        said = self.model_dump(exclude={"size", "shift", "sample_size"})
        return said | {"out_channels": self.in_channels // 4}


class QwenImageSurroundings(PipelineSurroundings):
    """Qwen2.5-VL, which reads each prompt within the pipeline's template, and a video autoencoder, given one frame.

    No condition is the prompt of one blank, the pipeline's own example of a negative prompt that says nothing.
    """

    pipeline = "QwenImagePipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderKLQwenImage",
        "text_encoder": "transformers:Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "transformers:Qwen2Tokenizer",
    }
    absent = ()
    blocks = "dim_mult"
    longest = 512  # tokens, as the pipeline's call has it

    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds: last hidden states after the template's head; zeros after a text's end, where mask is 0."""
        return _at_least(self._encoded(texts), self._unconditional()["mask"].shape[1])

    def empty(self) -> Cond:
        """One row: the condition of a blank."""
        return self._unconditional()

    def null(self, cond: Cond) -> Cond:
        """The blank's, as long as the texts of `cond`."""
        return _at_least(super().null(cond), cond["mask"].shape[1])

    def _unconditional(self) -> Cond:
        if "blank" not in self._loaded:
            self._loaded["blank"] = self._encoded([" "])
        return self._loaded["blank"]

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str]) -> Cond:
        embeds, mask = self.text_pipeline().encode_prompt(list(texts), self.device, max_sequence_length=self.longest)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        return Cond(prompt_embeds=embeds, mask=mask)

    def _posterior(self, vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._posterior(vae, images[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def _pixels(self, vae: Any, z: Tensor) -> Tensor:
        return super()._pixels(vae, z[:, :, None])[:, :, 0]


class QwenImageFamily(PatchedFamily):
    """QwenImageTransformer2DModel: called (patches, t, encoder_hidden_states=, its mask, img_shapes=); answers v in patches."""

    name = "qwen_image"
    facts = Facts(
        pipeline="QwenImagePipeline",
        component="transformer",
        network="diffusers:QwenImageTransformer2DModel",
        latent=Latent(channels=16, factor=8, patch=2, multiple=16, any_size=True),
        vae_norm="mean_std",
        guidance_rescale="norm",
        null="empty_text",
        step_generator=False,
        lora_mixin="QwenImageLoraLoaderMixin",
        lora_prefix="transformer",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        time_embedding="time_text_embed.timestep_embedder",
        # A block answers text and picture; this is the picture in it. Every size has these two blocks.
        feature_layers=("transformer_blocks.1.img_mlp", "transformer_blocks.0.img_mlp"),
    )

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Text to image: none of the inputs that networks for editing, layers or embedded guidance have besides."""
        return super().holds(config) and not any(config.get(name) for name in OTHER_INPUTS)

    def build(self, **config: Any) -> Loaded:
        """A QwenImageTransformer2DModel with random weights and nothing around it."""
        from diffusers import QwenImageTransformer2DModel

        _refuse_maskless()
        where = f"{self.name} build"
        c = parse(QwenImageConfig, preset(SIZES, config, where), where)
        module: Any = _exact_time(QwenImageTransformer2DModel(**c.arguments()))
        self.fit(module, (c.in_channels // 4, c.sample_size, c.sample_size))
        path = path_from({"kind": "flow", "shift": c.shift, "num_train_timesteps": LABELS})
        return Loaded(module, self.name, path, QwenImageSurroundings(None, module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoder follow when they are asked for."""
        _refuse_maskless()
        loaded = super().load(folder)
        return replace(loaded, around=QwenImageSurroundings(folder, _exact_time(loaded.module)))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Patches, t, text states with their mask, and the number of patches a side."""
        rows, _, height, width = x.shape
        return {
            "hidden_states": patches(x),
            "timestep": timestep / LABELS,
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "encoder_hidden_states_mask": cond["mask"],
            "img_shapes": [[(1, height // 2, width // 2)]] * rows,
        }

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        width = settings(module).joint_attention_dim
        return Cond(prompt_embeds=torch.zeros(1, 1, width), mask=torch.ones(1, 1, dtype=torch.long))


def _refuse_maskless() -> None:
    """Before 0.38 the class takes a mask and attends to padding all the same."""
    from diffusers.models.transformers import transformer_qwenimage

    if not hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask"):
        raise UserError("Qwen-Image reads padding as text in this version of diffusers: install diffusers >= 0.38")


def _exact_time(module: Any) -> Any:
    """`module` itself, whose first layer answers in float32 under autocast too.

    The class casts t to that layer's dtype, and bfloat16 has .0039 between neighbours below 1: too much where answers at
    times a hundredth apart are subtracted. Pipelines in bfloat16 round t as well, but not 1 and .5.
    """
    module.img_in.register_forward_hook(_in_float32)
    return module


def _in_float32(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if output.dtype == torch.float64 else output.float()


def _at_least(cond: Cond, length: int) -> Cond:
    """Texts of `length` tokens, padded; longer ones as they are."""
    more = max(0, length - cond["mask"].shape[1])
    return cond.with_(prompt_embeds=pad(cond["prompt_embeds"], (0, 0, 0, more)), mask=pad(cond["mask"], (0, more)))


QWEN_IMAGE = QwenImageFamily()
