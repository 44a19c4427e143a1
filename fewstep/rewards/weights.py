"""Weights of published judges: found on this machine, read from safetensors, never downloaded and never unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import UserError
from .base import RewardSpec

M = TypeVar("M", bound=nn.Module)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = (
    "python -c \"import torch, safetensors.torch as s; d = torch.load('{file}', weights_only=True, map_location='cpu'); "
    "s.save_file({{k: v.contiguous().clone() for k, v in d.get('state_dict', d).items()}}, '{made}')\""
)
_IDLE = ("position_ids", "attn_mask")  # constants that older files hold as weights


class WeightsSpec(RewardSpec):
    """Options of every reward with published weights."""

    source: str | None = Field(
        default=None, alias="from", description="folder, file, or hub id that is in the local cache"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="in which the weights are held")

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as torch says it."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Published:
    """Where weights come from. option: as in the recipe. hub: looked up when nothing is said. fetch: how to get them."""

    option: str
    hub: str | None
    fetch: str

    def find(self, said: str | None) -> Path | None:
        """Where they lie; UserError when nowhere. On the meta device None: a memory plan asks for sizes only."""
        from ..models.hub import local
        from ..resources import locate

        if find_spec("transformers") is None:
            raise UserError(f'{self.option}: this reward needs transformers: pip install "fewstep[text]"')
        source = said or self.hub
        found = source and (locate(source) if locate(source).is_file() else local(source))
        if found:
            return found
        if planning():
            return None
        lacking = (
            f"'{source}' is neither here nor in the local Hugging Face cache" if source else "no weights are named"
        )
        raise UserError(f"{self.option}: {lacking}: fetch them ({self.fetch}), then set {self.option}=FOLDER")

    def read(self, place: Path) -> dict[str, Tensor]:
        """All tensors of a safetensors file, or of the only model in a folder. UserError for pickles and nothing."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        state: dict[str, Tensor] = {}
        for file in self._files(place):
            try:
                state.update(load_file(file))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.option}: cannot read '{file}' ({error}): fetch it anew") from None
        return {name: tensor for name, tensor in state.items() if not name.endswith(_IDLE)}

    def _files(self, place: Path) -> list[Path]:
        if place.is_file():
            return [self._accepted(place)]
        index = place / "model.safetensors.index.json"
        if index.is_file():
            return [place / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (place / "model.safetensors").is_file():
            return [place / "model.safetensors"]
        found = sorted(place.glob("*.safetensors"))
        if len(found) > 1:
            raise UserError(f"{self.option}: '{place}' holds {len(found)} models: name one, {self.option}={found[0]}")
        pickles = sorted(p for p in place.iterdir() if p.suffix in _PICKLES)
        if not found and not pickles:
            raise UserError(f"{self.option}: no safetensors in '{place}': fetch them ({self.fetch})")
        return [self._accepted((found or pickles)[0])]

    def _accepted(self, file: Path) -> Path:
        if file.suffix == ".safetensors":
            return file
        convert = _CONVERT.format(file=file, made=file.with_suffix(".safetensors"))
        raise UserError(f"{self.option}: '{file}' is a pickle, which is never loaded; convert it once: {convert}")


def planning() -> bool:
    """True on the meta device, where networks have sizes and no weights."""
    return torch.get_default_device().type == "meta"


def filled(
    make: Callable[[], M], state: Mapping[str, Tensor] | None, dtype: torch.dtype, option: str, exact: str = "-"
) -> M:
    """The network that `make` builds, with exactly the weights `state`, in `dtype`; None leaves it without any.

    Nothing is initialised and no weight is held twice. exact: names that begin so stay in float32. UserError when a name
    or a shape differs.
    """
    from accelerate import init_empty_weights

    with nullcontext() if planning() else init_empty_weights(include_buffers=False):
        network = make().eval()
    if planning() or state is None:
        return network.to(dtype)
    try:
        kept = {k: v.to(torch.float32 if k.startswith(exact) else dtype) for k, v in state.items()}
        network.load_state_dict(kept, strict=True, assign=True)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1].split())
        raise UserError(f"{option}: these are not the weights of this reward: {first[:120]}") from None
    return network


def config_in(folder: Path, kind: str, option: str) -> Mapping[str, Any]:
    """config.json of a transformers folder whose model_type is `kind`; UserError for another."""
    try:
        said: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{option}: '{folder}' has no readable config.json: give a folder saved by transformers"
        ) from None
    if said.get("model_type") != kind:
        raise UserError(f"{option}: '{folder}' holds a model of type {said.get('model_type')}, not {kind}")
    return said
