"""LoRA files in peft's key layout, as diffusers' loaders and peft read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..nets.lora import Adapter

LORA_FILE = "pytorch_lora_weights.safetensors"


def save_lora(adapter: Adapter, prefix: str, file: Path, said: Mapping[str, Any]) -> None:
    """Writes `prefix.<layer>.lora_A.weight` (down) and `lora_B.weight` (up), with rank and alpha in the metadata.

    said: how the adapted network is sampled; kept under the metadata key "fewstep".
    """
    config = {f"{prefix}.{key}": value for key, value in lora_config(adapter).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config), "fewstep": json.dumps(said)}
    save_file({f"{prefix}.{name}": tensor for name, tensor in lora_state(adapter).items()}, file, metadata)


def lora_state(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's weights by peft's names, without prefix."""
    names = {"lora_A": adapter.down, "lora_B": adapter.up}
    return {
        f"{_layer(key)}.{name}.weight": part.weight.detach().cpu().contiguous()  # type: ignore[operator]
        for name, parts in names.items()
        for key, part in parts.items()
    }


def lora_config(adapter: Adapter) -> dict[str, Any]:
    """Arguments of the `peft.LoraConfig` that fits. Layers too small for the rank keep the factor alpha / rank."""
    ranks = {_layer(key): len(part.weight) for key, part in adapter.down.items()}  # type: ignore[arg-type]
    small = {layer: rank for layer, rank in ranks.items() if rank != adapter.rank}
    return {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": small,
        "alpha_pattern": {layer: adapter.scale * rank for layer, rank in small.items()},
    }


def _layer(key: str) -> str:
    return key.replace("/", ".")  # the adapter's ModuleDict cannot hold dots
