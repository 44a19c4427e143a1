"""What kohya's trainers and ComfyUI call the layers of a network, so that they find a LoRA's.

Both name layers as a network's first release did. A layer there may be several of diffusers' side by side, such as qkv:
their low ranks stand beside each other, each with rows of its own. Where diffusers' networks are the first release
(Qwen-Image), or where readers know diffusers' names as well (Z-Image), names stay.

kohya:   lora_unet_<layer, underscores>.lora_down.weight, .lora_up.weight, .alpha
ComfyUI: diffusion_model.<layer>.lora_A.weight, .lora_B.weight, .alpha
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError

Weights = Mapping[str, tuple[Tensor, Tensor]]  # (down, up) by layer


@dataclass(frozen=True)
class Place:
    """A layer by its outside name. parts: the layers here whose rows it has, from above.

    turned: the lower half of the rows comes first there.
    """

    name: str
    parts: tuple[str, ...]
    turned: bool = False


class LowRank(NamedTuple):
    """The change alpha / rank * up @ down of a weight; down has `rank` rows."""

    down: Tensor
    up: Tensor
    alpha: float


Naming = Callable[[str, nn.Module], "Place | None"]


def renamed(
    weights: Weights, scale: float, network: nn.Module, pipeline: str | None, layout: str
) -> dict[str, LowRank]:
    """Low ranks by their names in `layout` (kohya, comfyui).

    weights: (down, up) by the layers of `network`, each a change scale * up @ down.
    pipeline: the network's stock pipeline's class, which says whose names they are.
    Raises UserError for a layer that has no name there.
    """
    places = {place(layer, network, pipeline, layout) for layer in weights}
    return {p.name: _beside(weights, scale, network, p) for p in sorted(places, key=lambda p: p.name)}


def place(layer: str, network: nn.Module, pipeline: str | None, layout: str) -> Place:
    """Where `layer` of `network` lies in `layout`. Raises UserError when it has no name there."""
    found = _found(layer, network, pipeline, layout)
    if found is None:
        able = [name for name in NAMINGS if _found(layer, network, pipeline, name)]
        mend = " or ".join(["diffusers", "peft", *able])
        raise UserError(f"{layout} has no name for the layer {layer} of {type(network).__name__}: choose {mend}")
    return found


def _found(layer: str, network: nn.Module, pipeline: str | None, layout: str) -> Place | None:
    naming = NAMINGS[layout].get(str(pipeline))
    return naming(layer, network) if naming is not None else None


def _beside(weights: Weights, scale: float, network: nn.Module, at: Place) -> LowRank:
    """One low rank for layers that are rows of one: those that have none keep their rows at 0."""
    if len(at.parts) == 1:
        down, up = weights[at.parts[0]]
        return LowRank(down, torch.cat(up.chunk(2)[::-1]) if at.turned else up, scale * len(down))
    down = torch.cat([weights[part][0] for part in at.parts if part in weights])
    up = down.new_zeros(sum(_rows(network, part) for part in at.parts), len(down))
    row = column = 0
    for part in at.parts:
        if part in weights:
            own = weights[part][1]
            up[row : row + own.shape[0], column : column + own.shape[1]] = own
            column += own.shape[1]
        row += _rows(network, part)
    return LowRank(down, up, scale * len(down))


def _rows(network: nn.Module, layer: str) -> int:
    weight: Any = network.get_submodule(layer).weight
    return len(weight)


def _same(layer: str, _network: nn.Module) -> Place:
    return Place(layer, (layer,))


# ---- UNets: blocks are counted in the order of the forward pass

TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
WITHIN = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _first_unet(layer: str, network: nn.Module) -> Place | None:
    """Names of the first release of Stable Diffusion: input_blocks, middle_block, output_blocks."""
    if layer in TOP:
        return Place(TOP[layer], (layer,))
    if match := MIDDLE.fullmatch(layer):
        kind, i, rest = match[1], int(match[2]), match[3]
        order = 2 * i + (kind == "attentions")
        return Place(f"middle_block.{order}.{WITHIN.get(rest, rest)}", (layer,))
    if match := BLOCK.fullmatch(layer):
        return Place(_counted(network, match[1], int(match[2]), match[3], int(match[4]), match[5]), (layer,))
    return None


def _counted(network: nn.Module, side: str, block: int, kind: str, i: int, rest: str) -> str:
    """`side`.`block`.`kind`.`i`.`rest`, with all blocks of one side in one list."""
    blocks: Any = getattr(network, side)
    down = side == "down_blocks"
    # going down, a change of size has a number of its own; going up, it belongs to the last layer before it
    before = sum(len(b.resnets) + bool(down and b.downsamplers) for b in blocks[:block])
    sizes = len(blocks[block].resnets)
    if kind == "downsamplers":
        return f"input_blocks.{1 + before + sizes}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{before + sizes - 1}.{1 + hasattr(blocks[block], 'attentions')}.conv"
    place = f"input_blocks.{1 + before + i}" if down else f"output_blocks.{before + i}"
    return f"{place}.{int(kind == 'attentions')}.{WITHIN.get(rest, rest)}"


def _known_unet(layer: str, network: nn.Module) -> Place | None:
    """diffusers' names, for the layers that the first release had."""
    return None if _first_unet(layer, network) is None else Place(layer, (layer,))


# ---- transformers: names of the first release, and the layers here that they hold; * is the block's number


def _qkv(attention: str, *more: str) -> tuple[str, ...]:
    return (*(f"{attention}.to_{part}" for part in "qkv"), *more)


def _added(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.add_{part}_proj" for part in "qkv")


MMDIT: Mapping[str, Sequence[str]] = {
    "joint_blocks.*.x_block.attn.qkv": _qkv("transformer_blocks.*.attn"),
    "joint_blocks.*.x_block.attn.proj": ["transformer_blocks.*.attn.to_out.0"],
    "joint_blocks.*.x_block.attn2.qkv": _qkv("transformer_blocks.*.attn2"),
    "joint_blocks.*.x_block.attn2.proj": ["transformer_blocks.*.attn2.to_out.0"],
    "joint_blocks.*.x_block.mlp.fc1": ["transformer_blocks.*.ff.net.0.proj"],
    "joint_blocks.*.x_block.mlp.fc2": ["transformer_blocks.*.ff.net.2"],
    "joint_blocks.*.x_block.adaLN_modulation.1": ["transformer_blocks.*.norm1.linear"],
    "joint_blocks.*.context_block.attn.qkv": _added("transformer_blocks.*.attn"),
    "joint_blocks.*.context_block.attn.proj": ["transformer_blocks.*.attn.to_add_out"],
    "joint_blocks.*.context_block.mlp.fc1": ["transformer_blocks.*.ff_context.net.0.proj"],
    "joint_blocks.*.context_block.mlp.fc2": ["transformer_blocks.*.ff_context.net.2"],
    "joint_blocks.*.context_block.adaLN_modulation.1": ["transformer_blocks.*.norm1_context.linear"],
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
FLUX: Mapping[str, Sequence[str]] = {
    "double_blocks.*.img_attn.qkv": _qkv("transformer_blocks.*.attn"),
    "double_blocks.*.img_attn.proj": ["transformer_blocks.*.attn.to_out.0"],
    "double_blocks.*.img_mlp.0": ["transformer_blocks.*.ff.net.0.proj"],
    "double_blocks.*.img_mlp.2": ["transformer_blocks.*.ff.net.2"],
    "double_blocks.*.img_mod.lin": ["transformer_blocks.*.norm1.linear"],
    "double_blocks.*.txt_attn.qkv": _added("transformer_blocks.*.attn"),
    "double_blocks.*.txt_attn.proj": ["transformer_blocks.*.attn.to_add_out"],
    "double_blocks.*.txt_mlp.0": ["transformer_blocks.*.ff_context.net.0.proj"],
    "double_blocks.*.txt_mlp.2": ["transformer_blocks.*.ff_context.net.2"],
    "double_blocks.*.txt_mod.lin": ["transformer_blocks.*.norm1_context.linear"],
    "single_blocks.*.linear1": _qkv("single_transformer_blocks.*.attn", "single_transformer_blocks.*.proj_mlp"),
    "single_blocks.*.linear2": ["single_transformer_blocks.*.proj_out"],
    "single_blocks.*.modulation.lin": ["single_transformer_blocks.*.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
LUMINA_BLOCK: Mapping[str, Sequence[str]] = {
    "attention.qkv": _qkv("attn"),
    "attention.out": ["attn.to_out.0"],
    "feed_forward.w1": ["feed_forward.linear_1"],
    "feed_forward.w2": ["feed_forward.linear_2"],
    "feed_forward.w3": ["feed_forward.linear_3"],
    "adaLN_modulation.1": ["norm1.linear"],
}
LUMINA: Mapping[str, Sequence[str]] = {
    **{
        f"{blocks}.*.{name}": [f"{blocks}.*.{part}" for part in parts]
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for name, parts in LUMINA_BLOCK.items()
    },
    "x_embedder": ["x_embedder"],
    "cap_embedder.1": ["time_caption_embed.caption_embedder.1"],
    "t_embedder.mlp.0": ["time_caption_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_caption_embed.timestep_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear_1"],
    "final_layer.linear": ["norm_out.linear_2"],
}


def _turned(layer: str, network: nn.Module) -> bool:
    """diffusers' AdaLayerNormContinuous answers scale and shift, the first releases shift and scale."""
    from diffusers.models.normalization import AdaLayerNormContinuous

    return isinstance(network.get_submodule(layer.rpartition(".")[0]), AdaLayerNormContinuous)


def _table(rows: Mapping[str, Sequence[str]]) -> Naming:
    """A naming by such a table."""
    where = {part: (name, tuple(parts)) for name, parts in rows.items() for part in parts}

    def naming(layer: str, network: nn.Module) -> Place | None:
        number = re.search(r"\.(\d+)\.", layer)
        pattern = layer if number is None else layer[: number.start(1)] + "*" + layer[number.end(1) :]
        if pattern not in where:
            return None
        name, parts = where[pattern]
        block = number[1] if number is not None else ""
        held = tuple(part.replace("*", block) for part in parts)
        return Place(name.replace("*", block), held, _turned(layer, network))

    return naming


NAMINGS: Mapping[str, Mapping[str, Naming]] = {
    "kohya": {
        "StableDiffusionPipeline": _known_unet,
        "StableDiffusionXLPipeline": _first_unet,
        "StableDiffusion3Pipeline": _table(MMDIT),
        "FluxPipeline": _table(FLUX),
        "Lumina2Pipeline": _table(LUMINA),
        "QwenImagePipeline": _same,
        "ZImagePipeline": _same,
    },
    "comfyui": {
        "StableDiffusionPipeline": _first_unet,
        "StableDiffusionXLPipeline": _first_unet,
        "StableDiffusion3Pipeline": _table(MMDIT),
        "FluxPipeline": _table(FLUX),
        "Lumina2Pipeline": _table(LUMINA),
        "QwenImagePipeline": _same,
        "ZImagePipeline": _same,
    },
}
