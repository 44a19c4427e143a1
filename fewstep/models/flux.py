"""FLUX.1 dev and schnell: diffusers' FluxTransformer2DModel on VAE latents, with prompts.

States are latents [rows, channels, height, width]; the network reads them in patches of 2 x 2, [rows, height width / 4,
4 channels], and t itself, a thousandth of the label. A condition holds `prompt_embeds` [rows, length, width] of T5 and
`pooled` [rows, width] of CLIP. There is no mask: padding is attended to, so all texts have the pipeline's length.

Guidance is an input of dev's network: `guidance` [rows] of a condition, the usual scale, 1 where it says none. One call
at 3.5 is then the guided field. Schnell has no such input.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..data.batch import Cond
from ..maths.paths import FlowPath, Path
from ..nets.extra_inputs import reads
from .build import parse
from .family import Facts, Latent, Loaded, settings
from .flow_sizes import preset
from .folder import card, path_from
from .patched import SIDE, PatchedFamily, patches
from .surroundings import PipelineSurroundings, borrowed

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2")
SINGLE = ("proj_mlp", "single_transformer_blocks.*.proj_out")  # of the blocks that attend and feed forward side by side
LABELS = 1000  # of t = 1, in the scheduler
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    },
    "dev": {"guidance_embeds": True, "shift": math.exp(1.15)},  # the shift of the pipeline's own size
    "schnell": {},
}


class FluxConfig(BaseModel):
    """Sizes of a FluxTransformer2DModel. `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    sample_size: int = Field(
        default=SIDE, gt=0, multiple_of=2, description="of the latents that are drawn without data"
    )
    in_channels: int = Field(default=64, gt=0, multiple_of=4, description="of a patch: four times those of the latents")
    num_layers: int = Field(default=19, gt=0, description="blocks with weights of their own for text")
    num_single_layers: int = Field(default=38, gt=0, description="blocks with the same weights for text and picture")
    num_attention_heads: int = Field(default=24, gt=0)
    attention_head_dim: int = Field(default=128, gt=0)
    joint_attention_dim: int = Field(default=4096, gt=0, description="width of prompt_embeds")
    pooled_projection_dim: int = Field(default=768, gt=0, description="width of the pooled prompt")
    axes_dims_rope: tuple[int, int, int] = Field(default=(16, 56, 56), description="sum: attention_head_dim")
    guidance_embeds: bool = Field(default=False, description="guidance is an input of the network")
    shift: float = Field(default=1.0, gt=0, description="of the path's clock")
    around: str | None = Field(default=None, description="pipeline whose autoencoder and text encoders are used")

    def arguments(self) -> dict[str, Any]:
        """What FluxTransformer2DModel is made with."""
        return self.model_dump(exclude={"size", "shift", "sample_size", "around"})


class FluxSurroundings(PipelineSurroundings):
    """CLIP, of which the pooled state is read, and T5; no condition is the empty prompt."""

    pipeline = "FluxPipeline"
    network = "transformer"
    classes = {
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModel",
        "tokenizer": "transformers:CLIPTokenizer",
        "text_encoder_2": "transformers:T5EncoderModel",
        "tokenizer_2": "transformers:AutoTokenizer",
    }
    longest = 512  # tokens, as the pipeline's call has it

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Cond:
        """prompt_embeds: T5's last states, padding and all; pooled: CLIP's."""
        embeds, pooled, _ = self.text_pipeline().encode_prompt(
            list(texts), device=self.device, max_sequence_length=self.longest
        )
        return Cond(prompt_embeds=embeds, pooled=pooled)


class FluxFamily(PatchedFamily):
    """FluxTransformer2DModel: called (patches, t, guidance, both texts, and the places of both); answers v in patches."""

    name = "flux"
    facts = Facts(
        pipeline="FluxPipeline",
        component="transformer",
        network="diffusers:FluxTransformer2DModel",
        latent=Latent(channels=16, factor=8, patch=2, multiple=16, any_size=True),
        vae_norm="scale_shift",
        guidance="both",
        null="empty_text",
        step_generator=False,
        lora_mixin="FluxLoraLoaderMixin",
        lora_prefix="transformer",
        lora={"default": ATTENTION, "wide": (*ATTENTION, *TEXT, *SINGLE)},
        scalar_slot="guidance",
        time_embedding="time_text_embed.timestep_embedder",
        # A block answers text and picture; this is the picture in it. Every size has these two blocks.
        feature_layers=("transformer_blocks.1.ff", "transformer_blocks.0.ff"),
    )

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Text to image: networks that are shown another picture besides (Fill, Depth, Canny) read more than they answer."""
        return super().holds(config) and config.get("out_channels") in (None, config.get("in_channels"))

    def build(self, **config: Any) -> Loaded:
        """A FluxTransformer2DModel with random weights; around it, what `around` names."""
        from diffusers import FluxTransformer2DModel

        where = f"{self.name} build"
        c = parse(FluxConfig, preset(SIZES, config, where), where)
        module: Any = _pipeline_time(FluxTransformer2DModel(**c.arguments()))
        self.fit(module, (c.in_channels // 4, c.sample_size, c.sample_size))
        path = path_from({"kind": "flow", "shift": c.shift, "num_train_timesteps": LABELS})
        return Loaded(module, self.name, path, FluxSurroundings(borrowed(c.around), module))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoders follow when they are asked for."""
        loaded = super().load(folder)
        assert loaded.path is not None
        module = _pipeline_time(loaded.module)
        return replace(loaded, path=_static(loaded.path, folder), around=FluxSurroundings(folder, module))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Patches, t, guidance where the network has that input, both texts, and their places."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        return {
            "hidden_states": patches(x),
            "timestep": timestep.double() / LABELS,  # so that the label can be had back, see `_pipeline_time`
            "guidance": _guidance(module, x, cond),
            "pooled_projections": cond["pooled"].to(x),
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "txt_ids": torch.zeros(cond["prompt_embeds"].shape[1], 3, device=x.device),
            "img_ids": _places(height, width, x.device),
        }

    def upgrade(self, module: nn.Module, inputs: Sequence[str]) -> nn.Module:
        """Guidance alone: the stock class's own input, its last layer zero; unchanged when there is one already.

        With others beside it, which the class has no place for, all go through `nets.extra_inputs` and fold on export.
        """
        if tuple(inputs) != ("guidance",):
            return super().upgrade(module, inputs)
        if not self.embeds_guidance(module):
            module.time_text_embed = _with_guidance(module)
            module.register_to_config(guidance_embeds=True)  # type: ignore[operator]
        return module

    def embeds_guidance(self, module: nn.Module) -> bool:
        """dev, and what was upgraded."""
        return bool(settings(module).guidance_embeds)

    @torch.no_grad()
    def sealed(self, module: nn.Module) -> nn.Module:
        """A copy whose guidance input always adds what guidance 1 adds: stock pipelines feed it 3.5 unless they are told."""
        if not self.embeds_guidance(module):
            return module
        copied = copy.deepcopy(module)
        embed: Any = copied.time_text_embed
        last = embed.guidance_embedder.linear_2
        off = embed.time_proj(last.weight.new_full((1,), float(LABELS)))
        last.bias.copy_(embed.guidance_embedder(off.to(last.weight))[0])
        nn.init.zeros_(last.weight)
        return copied

    def blank(self, module: nn.Module) -> Cond:
        """Text states of one token."""
        c = settings(module)
        return Cond(
            prompt_embeds=torch.zeros(1, 1, c.joint_attention_dim), pooled=torch.zeros(1, c.pooled_projection_dim)
        )


def _static(path: Path, folder: FilePath) -> Path:
    """`path`, with the shift of the pipeline's own size where the folder's scheduler shifts by size.

    A student is trained on one clock and exported with it, at whatever size.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(file.read_text()) if file.is_file() else {}
    if not said.get("use_dynamic_shifting") or "path" in card(folder):
        return path
    return FlowPath(shift=dynamic_shift(said, SIDE * SIDE // 4), num_train_timesteps=LABELS)


def dynamic_shift(scheduler: Mapping[str, Any], tokens: int) -> float:
    """S of shift(u) = S u / (1 + (S - 1) u) that a scheduler of this config makes for pictures of so many patches.

    S = exp(mu), or mu itself where `time_shift_type` is linear; mu grows linearly with the patches.
    """
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = base + (top - base) * (tokens - low) / (high - low)
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)


def _guidance(module: nn.Module, x: Tensor, cond: Cond) -> Tensor | None:
    """[rows]; 1 where the condition says none, or where it goes in beside the stock class's own input."""
    if not settings(module).guidance_embeds:
        return None
    if "guidance" in cond and "guidance" not in reads(module):
        return cond["guidance"].to(x)
    return x.new_ones(len(x))


def _with_guidance(module: nn.Module) -> nn.Module:
    """The time and text embedding of `module` with a place for guidance that adds nothing yet."""
    from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings

    known: Any = module.time_text_embed
    weight = known.timestep_embedder.linear_2.weight
    made: Any = CombinedTimestepGuidanceTextProjEmbeddings(len(weight), settings(module).pooled_projection_dim)
    made.to(weight)
    made.timestep_embedder, made.text_embedder = known.timestep_embedder, known.text_embedder
    nn.init.zeros_(made.guidance_embedder.linear_2.weight)
    nn.init.zeros_(made.guidance_embedder.linear_2.bias)
    return made


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """[height width, 3]: 0, row, column of each patch."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def _pipeline_time(module: Any) -> Any:
    """`module` itself, which under autocast is fed the time that the stock pipeline in that precision feeds.

    There the label is rounded before it is divided: 857.7 becomes 856 in bfloat16. The class alone would round t, to
    .859. So answers at labels less than 4 apart may be one; the sampler's own levels stay in float32.
    """
    module.register_forward_pre_hook(_rounded, with_kwargs=True)
    return module


def _rounded(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    t = kwargs["timestep"]
    if t.is_meta or not torch.is_autocast_enabled(t.device.type):
        return None
    label = (t.double() * LABELS).float().to(torch.get_autocast_dtype(t.device.type))
    return args, {**kwargs, "timestep": label / LABELS}


FLUX = FluxFamily()
