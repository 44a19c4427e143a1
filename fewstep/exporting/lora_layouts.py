"""The names that kohya's tools and ComfyUI give the layers of stock networks, and LoRA weights under them.

A network's original files call its layers otherwise than diffusers does, and hold some side by side in one weight: the
LoRA of such layers is one of the joint rank, its up-projection block diagonal, so that nothing is approximated.

    kohya      SD 1.5, 2.1, Qwen-Image, Z-Image by diffusers' names; SDXL, SD3, Lumina-2, FLUX.1 by their original ones
    comfyui    SD, SDXL, Lumina-2 by original names; SD3, FLUX.1, Qwen-Image, Z-Image by diffusers', which it maps itself
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest
from ..nets.lora import Adapter

LAYOUTS = ("diffusers", "peft", "kohya", "comfyui")
Namer = Callable[[str, nn.Module], str | None]
Rules = Sequence[tuple[str, str]]  # pattern of diffusers' name, original name
_SIDE_BY_SIDE = ("to_q", "add_q_proj", "to_k", "add_k_proj", "to_v", "add_v_proj", "proj_mlp")  # in this order
_MODULATION = "adaLN_modulation.1"


class Pair(NamedTuple):
    """down [rank, in, ...] and up [out, rank, ...] of one layer."""

    down: Tensor
    up: Tensor


def pairs_of(adapter: Adapter) -> dict[str, Pair]:
    """The adapter's weights by layer, on the CPU."""
    found = {}
    for key, down in adapter.down.items():
        tensors = (part.weight.detach().cpu().contiguous() for part in (down, adapter.up[key]))  # type: ignore[operator]
        found[key.replace("/", ".")] = Pair(*tensors)  # the adapter's ModuleDict cannot hold dots
    return found


def check_layout(layout: str, adapter: Adapter | None, network: nn.Module) -> None:
    """UserError for an unknown layout, one asked of a student without LoRA, and layers that have no name in it."""
    if layout not in LAYOUTS:
        raise UserError(f"unknown --lora-layout '{layout}': {nearest(layout, LAYOUTS)}")
    if adapter is None and layout != LAYOUTS[0]:
        raise UserError("the student is tuned in full and has no LoRA: leave --lora-layout out, or train with tune: lora")
    nameless = [] if adapter is None else _nameless(layout, adapter, network)
    if nameless and adapter is not None:
        able = [other for other in LAYOUTS if not _nameless(other, adapter, network)]
        raise UserError(
            f"{nameless[0]} of {type(network).__name__} has no name in the {layout} layout: "
            f"write --lora-layout {' or '.join(able)}"
        )


def laid_out(layout: str, adapter: Adapter, network: nn.Module) -> dict[str, Tensor]:
    """Weights and alphas by kohya's or ComfyUI's names. network: of the base's class, with its layers.

    Every alpha is the trainer's factor times the rank written, since readers scale by alpha / rank.
    """
    check_layout(layout, adapter, network)
    prefix, name_of = _NAMES[layout][type(network).__name__]
    a, b = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    pairs, state = pairs_of(adapter), {}
    for name, layers in _side_by_side(name_of, network).items():
        if not any(layer in pairs for layer in layers):
            continue
        down, up = _joint(layers, pairs, network)
        full = prefix + (name.replace(".", "_") if layout == "kohya" else name)
        alpha = adapter.alpha if len(down) == adapter.rank else adapter.scale * len(down)
        up = _shift_first(up) if name.endswith(_MODULATION) and _scales_first(layers[0], network) else up
        state |= {f"{full}.{a}.weight": down, f"{full}.{b}.weight": up, f"{full}.alpha": torch.tensor(float(alpha))}
    return state


def _nameless(layout: str, adapter: Adapter, network: nn.Module) -> list[str]:
    if layout not in _NAMES:
        return []
    _, name_of = _NAMES[layout].get(type(network).__name__, ("", _nothing))
    return [layer for key in adapter.down if name_of(layer := key.replace("/", "."), network) is None]


def _side_by_side(name_of: Namer, network: nn.Module) -> dict[str, list[str]]:
    """Layers of each named weight, from its first row to its last."""
    found: dict[str, list[str]] = {}
    for layer, module in network.named_modules():
        name = name_of(layer, network) if isinstance(module, nn.Linear | nn.Conv2d) else None
        if name is not None:
            found.setdefault(name, []).append(layer)
    return {name: sorted(layers, key=_place) if len(layers) > 1 else layers for name, layers in found.items()}


def _place(layer: str) -> int:
    return _SIDE_BY_SIDE.index(layer.rpartition(".")[2])


def _joint(layers: Sequence[str], pairs: Mapping[str, Pair], network: nn.Module) -> Pair:
    """The pair of a weight that holds `layers` one below the other; rows of those without LoRA stay as they are."""
    if len(layers) == 1:
        return pairs[layers[0]]
    rows = [network.get_parameter(f"{layer}.weight").shape[0] for layer in layers]
    ups = [pairs[layer].up if layer in pairs else torch.zeros(n, 0) for layer, n in zip(layers, rows)]
    return Pair(torch.cat([pairs[layer].down for layer in layers if layer in pairs]), torch.block_diag(*ups))


def _scales_first(layer: str, network: nn.Module) -> bool:
    """Whether diffusers turned the halves of this modulation around: scale, then shift."""
    return type(network.get_submodule(layer.rpartition(".")[0])).__name__ == "AdaLayerNormContinuous"


def _shift_first(up: Tensor) -> Tensor:
    return torch.cat(up.chunk(2)[::-1])


# ---- names. What a table leaves out, the layout's readers would drop without a word.


def _nothing(layer: str, network: nn.Module) -> None:
    return None


def _by(rules: Rules) -> Namer:
    def name(layer: str, network: nn.Module) -> str | None:
        for pattern, original in rules:
            found = re.fullmatch(pattern, layer)
            if found is not None:
                return found.expand(original)
        return None

    return name


def _kept(named: Namer) -> Namer:
    """Diffusers' own names, of the layers that `named` knows."""
    return lambda layer, network: layer if named(layer, network) is not None else None


_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = r"proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"


def _unet(layer: str, network: nn.Module) -> str | None:
    """A layer of SD or SDXL as the first release numbered it: blocks in one row down, and in one row up."""
    found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", layer)
    if found is None:
        return _OUTER.get(layer)
    side, block, part, i, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    inner = _inside(part, rest, side)
    if inner is None:
        return None
    if side == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * i}.{inner}"
    each = network.config.layers_per_block + 1  # type: ignore[union-attr, operator]
    last = part.endswith("samplers")
    if side == "down":
        return f"input_blocks.{1 + each * block + (each - 1 if last else i)}.{int(part == 'attentions')}.{inner}"
    attends = hasattr(network.get_submodule(f"up_blocks.{block}"), "attentions")
    column = 1 + attends if last else int(part == "attentions")
    return f"output_blocks.{each * block + (each - 1 if last else i)}.{column}.{inner}"


def _inside(part: str, rest: str, side: str) -> str | None:
    if part == "resnets":
        return _RESNET.get(rest)
    if part == "attentions":
        return rest if re.fullmatch(_ATTENTION, rest) else None
    return {"down": "op", "up": "conv"}[side] if rest == "conv" else None


def _kohya_unet(layer: str, network: nn.Module) -> str | None:
    """kohya trains SDXL in its original form, and the others in diffusers'."""
    original = _unet(layer, network)
    is_xl = network.config.addition_embed_type == "text_time"  # type: ignore[union-attr]
    return layer if original is not None and not is_xl else original


_JOINT = r"transformer_blocks\.(\d+)\."
_SINGLE = r"single_transformer_blocks\.(\d+)\."
_SD3: Rules = (
    (_JOINT + r"(attn2?)\.to_[qkv]", r"joint_blocks.\1.x_block.\2.qkv"),
    (_JOINT + r"(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (_JOINT + r"attn\.add_[qkv]_proj", r"joint_blocks.\1.context_block.attn.qkv"),
    (_JOINT + r"attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (_JOINT + r"ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (_JOINT + r"ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (_JOINT + r"ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (_JOINT + r"ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (_JOINT + r"norm1\.linear", rf"joint_blocks.\1.x_block.{_MODULATION}"),
    (_JOINT + r"norm1_context\.linear", rf"joint_blocks.\1.context_block.{_MODULATION}"),
    (r"norm_out\.linear", f"final_layer.{_MODULATION}"),
    (r"proj_out", "final_layer.linear"),
    (r"context_embedder", "context_embedder"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
)
# Of a kohya file diffusers loses the layers outside FLUX.1's blocks, or their alpha: they are no part of it.
_FLUX: Rules = (
    (_JOINT + r"attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (_JOINT + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (_JOINT + r"attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (_JOINT + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (_JOINT + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (_JOINT + r"ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (_JOINT + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (_JOINT + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (_JOINT + r"norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (_JOINT + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (_SINGLE + r"(?:attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (_SINGLE + r"proj_out", r"single_blocks.\1.linear2"),
    (_SINGLE + r"norm\.linear", r"single_blocks.\1.modulation.lin"),
)
_FLUX_OUTER: Rules = (
    (r"(x_embedder|context_embedder|norm_out\.linear|proj_out)", r"\1"),
    (r"(time_text_embed\.(?:timestep|guidance|text)_embedder\.linear_[12])", r"\1"),
)
_REFINED = r"((?:layers|noise_refiner|context_refiner)\.\d+)\."
_LUMINA2: Rules = (
    (_REFINED + r"attn\.to_[qkv]", r"\1.attention.qkv"),
    (_REFINED + r"attn\.to_out\.0", r"\1.attention.out"),
    (_REFINED + r"feed_forward\.linear_([123])", r"\1.feed_forward.w\2"),
    (_REFINED + r"norm1\.linear", rf"\1.{_MODULATION}"),
    (r"norm_out\.linear_1", f"final_layer.{_MODULATION}"),
    (r"norm_out\.linear_2", "final_layer.linear"),
    (r"x_embedder", "x_embedder"),
    (r"time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_caption_embed\.caption_embedder\.1", "cap_embedder.1"),
)
_Z_IMAGE: Rules = (
    (rf"({_REFINED}(?:attention\.(?:to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0))", r"\1"),
    (r"(all_x_embedder\.2-1|all_final_layer\.2-1\.(?:linear|adaLN_modulation\.1))", r"\1"),
    (r"(t_embedder\.mlp\.[02]|cap_embedder\.1)", r"\1"),
)
_QWEN: Rules = (
    (r"(transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out))", r"\1"),
    (r"(transformer_blocks\.\d+\.(?:img|txt)_(?:mod\.1|mlp\.net\.0\.proj|mlp\.net\.2))", r"\1"),
    (r"(img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12])", r"\1"),
)
_NAMES: Mapping[str, Mapping[str, tuple[str, Namer]]] = {
    "kohya": {
        "UNet2DConditionModel": ("lora_unet_", _kohya_unet),
        "SD3Transformer2DModel": ("lora_unet_", _by(_SD3)),
        "FluxTransformer2DModel": ("lora_unet_", _by(_FLUX)),
        "Lumina2Transformer2DModel": ("lora_unet_", _by(_LUMINA2)),
        "ZImageTransformer2DModel": ("lora_unet_", _by(_Z_IMAGE)),
        "QwenImageTransformer2DModel": ("lora_unet_", _by(_QWEN)),
    },
    "comfyui": {
        "UNet2DConditionModel": ("diffusion_model.", _unet),
        "SD3Transformer2DModel": ("transformer.", _kept(_by(_SD3))),
        "FluxTransformer2DModel": ("transformer.", _kept(_by((*_FLUX, *_FLUX_OUTER)))),
        "Lumina2Transformer2DModel": ("diffusion_model.", _by(_LUMINA2)),
        "ZImageTransformer2DModel": ("diffusion_model.", _by(_Z_IMAGE)),
        "QwenImageTransformer2DModel": ("diffusion_model.", _by(_QWEN)),
    },
}
