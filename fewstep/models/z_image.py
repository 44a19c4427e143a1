"""Z-Image: diffusers' ZImageTransformer2DModel on VAE latents, with prompts.

States are latents [rows, channels, height, width]. The network reads and answers lists, one tensor a row: latents
[channels, 1, height, width] and text states [length, width], without padding. It is fed 1 - t, and answers -v. A
condition holds `prompt_embeds` [rows, length, width] and `mask` [rows, length] (1 = text, 0 = padding).

Guidance is the usual one in v, but the stock pipeline's number is the usual scale minus one (`facts.guidance_offset`):
0 is off, and its default of 5 means 6. Before diffusers 0.39 that pipeline, asked for N steps alone, takes N levels from
1 down to 0: it has to be told `sigmas` 1, 1-1/N, ..., 1/N. In 0.36 it does not guide at numbers up to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..data.batch import Cond
from .build import parse
from .family import Facts, Latent, Loaded, settings
from .flow_sizes import preset
from .folder import path_from
from .patched import SIDE, PatchedFamily
from .surroundings import PipelineSurroundings, borrowed

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = ("w1", "w2", "w3")  # of the feed-forward layers
LABELS = 1000  # of t = 1, in the scheduler
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": (8, 4, 4),
    },
    "6b": {},
}


class ZImageConfig(BaseModel):
    """Sizes of a ZImageTransformer2DModel. `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(
        default=SIDE, gt=0, multiple_of=2, description="of the latents that are drawn without data"
    )
    in_channels: int = Field(default=16, gt=0, description="of the latents")
    dim: int = Field(default=3840, gt=0, description="width")
    n_layers: int = Field(default=30, gt=0, description="blocks that see picture and text")
    n_refiner_layers: int = Field(default=2, gt=0, description="blocks before them, of each of the two alone")
    n_heads: int = Field(default=30, gt=0)
    cap_feat_dim: int = Field(default=2560, gt=0, description="width of prompt_embeds")
    axes_dims: tuple[int, int, int] = Field(default=(32, 48, 48), description="sum: dim / n_heads")
    axes_lens: tuple[int, int, int] = Field(default=(1024, 512, 512), description="places of text, rows, columns")
    shift: float = Field(default=3.0, gt=0, description="of the path's clock: 3 of Turbo, 6 of the base")
    around: str | None = Field(default=None, description="pipeline whose autoencoder and text encoder are used")

    def arguments(self) -> dict[str, Any]:
        """What ZImageTransformer2DModel is made with."""
        said = self.model_dump(exclude={"size", "shift", "sample_size", "around"})
        return said | {"n_kv_heads": self.n_heads}


class ZImageSurroundings(PipelineSurroundings):
    """Qwen3, which reads each prompt within its chat template; no condition is the empty prompt in the same template."""

    pipeline = "ZImagePipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:AutoModel",
        "tokenizer": "transformers:AutoTokenizer",
    }
    absent = ()
    longest = 512  # tokens, as the pipeline's call has it

    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds: the last but one hidden states, zeros after a text's end, where mask is 0."""
        return Cond.cat([self._encoded(texts), self.empty()])[: len(texts)]  # at least as long as the empty prompt

    def empty(self) -> Cond:
        """One row: the condition of the empty prompt."""
        if "empty" not in self._loaded:
            self._loaded["empty"] = self._encoded([""])
        return self._loaded["empty"]

    def null(self, cond: Cond) -> Cond:
        """The empty prompt's, as long as the texts of `cond`."""
        return Cond.cat([cond, super().null(cond)])[len(cond["mask"]) :]

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str]) -> Cond:
        embeds, _ = self.text_pipeline().encode_prompt(
            list(texts), self.device, do_classifier_free_guidance=False, max_sequence_length=self.longest
        )
        ones = [embed.new_ones(len(embed), dtype=torch.long) for embed in embeds]
        return Cond(prompt_embeds=pad_sequence(embeds, batch_first=True), mask=pad_sequence(ones, batch_first=True))


class ZImageFamily(PatchedFamily):
    """ZImageTransformer2DModel: called (list of latents, 1 - t, list of text states); answers a list of -v."""

    name = "z_image"
    facts = Facts(
        pipeline="ZImagePipeline",
        component="transformer",
        network="diffusers:ZImageTransformer2DModel",
        time_reversed=True,
        sign=-1,
        latent=Latent(channels=16, factor=8, patch=2, multiple=16, any_size=True),
        vae_norm="scale_shift",
        guidance_offset=1.0,
        null="empty_text",
        step_generator=False,
        lora_mixin="ZImageLoraLoaderMixin",
        lora_prefix="transformer",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *WIDE)},
        time_embedding="t_embedder",
        # Pictures alone; the blocks after these hold text too, as much as the longest of the batch.
        feature_layers=("noise_refiner.1", "noise_refiner.0"),
    )

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Text to image: no input for other pictures' features, which Omni has besides."""
        return super().holds(config) and not config.get("siglip_feat_dim")

    def build(self, **config: Any) -> Loaded:
        """A ZImageTransformer2DModel with random weights; around it, what `around` names."""
        from diffusers import ZImageTransformer2DModel

        where = f"{self.name} build"
        c = parse(ZImageConfig, preset(SIZES, config, where), where)
        module: Any = _padded_alike(ZImageTransformer2DModel(**c.arguments()))
        for token in (module.x_pad_token, module.cap_pad_token):
            nn.init.zeros_(token)  # before 0.42 the class leaves them as the memory was
        self.fit(module, (c.in_channels, c.sample_size, c.sample_size))
        path = path_from({"kind": "flow", "shift": c.shift, "num_train_timesteps": LABELS})
        return Loaded(module, self.name, path, ZImageSurroundings(borrowed(c.around), module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoder follow when they are asked for."""
        loaded = super().load(folder)
        return replace(loaded, around=ZImageSurroundings(folder, _padded_alike(loaded.module)))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """A row's latents as one frame, 1 - t, and a row's text states as far as the text goes."""
        texts = cond["prompt_embeds"].to(x)
        return {
            "x": list(x.unsqueeze(2)),
            "t": (LABELS - timestep) / LABELS,
            "cap_feats": [text[:length] for text, length in zip(texts, _lengths(cond["mask"]))],
        }

    def unpack(self, module: nn.Module, output: Any, x: Tensor) -> Tensor:
        """v = -output."""
        return -torch.stack(output.sample).squeeze(2)

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        width = settings(module).cap_feat_dim
        return Cond(prompt_embeds=torch.zeros(1, 1, width), mask=torch.ones(1, 1, dtype=torch.long))

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[channels, height, width] of latents: the data's, or without data those that the pipeline draws."""
        return getattr(module, "latent_shape", (settings(module).in_channels, SIDE, SIDE))


def _padded_alike(module: Any) -> Any:
    """`module` itself, whose first layers answer in their weights' dtype under autocast too.

    diffusers 0.36 writes padding of that dtype into what they answer, and fails where it is another.
    """
    for part in (*module.all_x_embedder.values(), module.cap_embedder):
        part.register_forward_hook(_as_weights)
    return module


def _as_weights(part: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(next(part.parameters()).dtype)


def _lengths(mask: Tensor) -> list[int]:
    """Tokens of each text; of all that there is room for where only sizes are asked for."""
    return [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(1).tolist()


Z_IMAGE = ZImageFamily()
