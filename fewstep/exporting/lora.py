"""LoRA files in the key layouts of diffusers, peft, kohya's trainers and ComfyUI. Rank and alpha are kept in all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError, nearest
from ..nets.lora import Adapter
from .lora_layouts import NAMINGS, LowRank, place, renamed

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_FILES: Mapping[str, str] = {  # by layout; peft's is a folder
    "diffusers": LORA_FILE,
    "peft": "lora_peft",
    "kohya": "lora_kohya.safetensors",
    "comfyui": "lora_comfyui.safetensors",
}


def check_layout(
    layout: str, adapter: Adapter | None = None, network: nn.Module | None = None, family: Any = None
) -> None:
    """UserError for a layout that there is not, or that has no name for a layer of the adapter of `network`."""
    if layout not in LORA_FILES:
        raise UserError(f"unknown LoRA layout '{layout}': {nearest(layout, LORA_FILES)}")
    if layout in NAMINGS and adapter is not None and network is not None:
        for key in adapter.down:
            place(_layer(key), network, _pipeline(family), layout)


def write_lora(
    adapter: Adapter, network: nn.Module, family: Any, folder: Path, said: Mapping[str, Any], layout: str = "diffusers"
) -> str:
    """Writes the adapter of `network` into `folder` in a layout, and answers the name of the file, or of peft's folder.

    said: how the adapted network is sampled; kept under the metadata key "fewstep".
    Raises UserError when the layout has no name for a layer.
    """
    check_layout(layout)
    name = LORA_FILES[layout]
    facts = getattr(family, "facts", None)
    if layout in NAMINGS:
        changes = renamed(_weights(adapter), adapter.scale, network, _pipeline(family), layout)
        save_renamed(changes, adapter, layout, folder / name, said)
    elif layout == "peft":
        save_peft(adapter, folder / name, said)
    else:
        prefix = facts.lora_prefix or facts.component if facts is not None else "base_model.model"
        save_lora(adapter, prefix, folder / name, said)
    return name


def save_lora(adapter: Adapter, prefix: str, file: Path, said: Mapping[str, Any]) -> None:
    """Writes `prefix.<layer>.lora_A.weight` (down) and `lora_B.weight` (up), with rank and alpha in the metadata."""
    config = {f"{prefix}.{key}": value for key, value in lora_config(adapter).items()}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    _save({f"{prefix}.{name}": tensor for name, tensor in lora_state(adapter).items()}, file, said, metadata)


def save_peft(adapter: Adapter, folder: Path, said: Mapping[str, Any]) -> None:
    """Writes the folder that `peft.PeftModel.from_pretrained(network, folder)` reads."""
    folder.mkdir()
    kind = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(kind | lora_config(adapter), indent=2) + "\n")
    tensors = {f"base_model.model.{name}": tensor for name, tensor in lora_state(adapter).items()}
    _save(tensors, folder / "adapter_model.safetensors", said)


def save_renamed(
    changes: Mapping[str, LowRank], adapter: Adapter, layout: str, file: Path, said: Mapping[str, Any]
) -> None:
    """Writes changes by outside names in the keys of kohya's trainers or of ComfyUI."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in changes.items():
        if layout == "kohya":
            key, ends = f"lora_unet_{name.replace('.', '_')}", ("lora_down", "lora_up")
        else:
            key, ends = f"diffusion_model.{name}", ("lora_A", "lora_B")
        tensors |= {f"{key}.{ends[0]}.weight": down, f"{key}.{ends[1]}.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    network = {"module": "networks.lora", "dim": str(adapter.rank), "alpha": str(adapter.alpha)}
    _save(tensors, file, said, {f"ss_network_{key}": value for key, value in network.items()})


def lora_state(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's weights by peft's names, without prefix."""
    ends = ("lora_A", "lora_B")
    return {
        f"{layer}.{end}.weight": weight for layer, pair in _weights(adapter).items() for end, weight in zip(ends, pair)
    }


def lora_config(adapter: Adapter) -> dict[str, Any]:
    """Arguments of the `peft.LoraConfig` that fits. Layers too small for the rank keep the factor alpha / rank."""
    ranks = {_layer(key): len(part.weight) for key, part in adapter.down.items()}  # type: ignore[arg-type]
    # ^: peft would take `proj_out` for the ending of other layers' names too
    small = {f"^{layer}": rank for layer, rank in ranks.items() if rank != adapter.rank}
    return {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": small,
        "alpha_pattern": {layer: adapter.scale * rank for layer, rank in small.items()},
    }


def _pipeline(family: Any) -> str | None:
    return family.facts.pipeline if hasattr(family, "facts") else None


def _weights(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by layer, on the CPU."""
    return {_layer(key): (_of(adapter.down[key]), _of(adapter.up[key])) for key in adapter.down}


def _of(part: nn.Module) -> Tensor:
    weight: Any = part.weight
    return weight.detach().cpu().contiguous()


def _save(
    tensors: Mapping[str, Tensor], file: Path, said: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    save_file(dict(tensors), file, {"format": "pt", **(metadata or {}), "fewstep": json.dumps(said)})


def _layer(key: str) -> str:
    return key.replace("/", ".")  # the adapter's ModuleDict cannot hold dots
