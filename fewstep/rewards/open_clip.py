"""ViT CLIP weights under open_clip's names, as a transformers `CLIPModel`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # spelt so in transformers
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names: projections transposed, joint q, k, v split."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif ".attn.in_proj_" in name:
            layer, kind = _renamed(name).split(".attn.in_proj_")
            renamed |= {f"{layer}.self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", tensor.chunk(3))}
        else:
            renamed[_renamed(name)] = tensor
    return renamed


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def sizes_of(state: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """transformers' config of a model with open_clip names; `heads` attention heads in both towers, and exact GELU."""
    shape = {name: tensor.shape for name, tensor in state.items()}
    vocabulary, projection = shape["token_embedding.weight"][0], shape["text_projection"][1]
    patch = shape["visual.conv1.weight"][-1]
    shared = {"num_attention_heads": heads, "hidden_act": "gelu", "projection_dim": projection}
    text = {
        **_tower(shape, "transformer.", shape["ln_final.weight"][0]),
        "vocab_size": vocabulary,
        "max_position_embeddings": shape["positional_embedding"][0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    vision = {
        **_tower(shape, "visual.transformer.", shape["visual.class_embedding"][0]),
        "patch_size": patch,
        "image_size": patch * math.isqrt(shape["visual.positional_embedding"][0] - 1),
    }
    return {"projection_dim": projection, "text_config": text | shared, "vision_config": vision | shared}


def _tower(shape: Mapping[str, Any], prefix: str, width: int) -> dict[str, int]:
    layers = sum(name.startswith(prefix) and name.endswith(".ln_1.weight") for name in shape)
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": shape[f"{prefix}resblocks.0.mlp.c_fc.weight"][0],
    }
