"""The rest of a diffusers pipeline folder around a latent network: VAE, text encoders, tokenizers.

    around = loaded.around
    x0 = around.encode(images)                 # [rows, 3, H, W] in [-1, 1] -> latents as the network reads them
    images = around.decode(x0)                 # gradients flow through
    cond = around.prompts(["a cat", "a dog"])

Parts are loaded when they are first asked for, from safetensors, in float32, frozen, on the network's device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.batch import Cond
from ..errors import UserError
from ..store import content_key
from .hub import find_model
from .quiet import quiet

INDEX = "model_index.json"
_HASHED = (".json", ".txt", ".safetensors")


class PipelineSurroundings:
    """Base of a family's `Surroundings`. Subclasses name the pipeline and its parts, and write `prompts` and `null`.

    folder: of the pipeline; None for a network built from sizes, which has nothing around it.
    pipeline: stock class, whose own `encode_prompt` makes conditions. classes: part -> "module:Class".
    network: name of the pipeline's network, which `encode_prompt` does without.
    absent: parts that the pipeline's constructor asks for and that are never loaded.
    blocks, usual_factor: the VAE's config entry with a width a level, and pixels a latent where there is no VAE.
    longest: tokens of a text that the network reads at most.
    pixels_at_once: the VAE works on so many pixels at a time (and on one row at least), which bounds its memory.
    """

    pipeline: str
    classes: Mapping[str, str]
    network: str = "unet"
    absent: tuple[str, ...] = ("feature_extractor", "image_encoder")
    pixels_at_once: int = 2**20
    blocks: str = "block_out_channels"
    usual_factor: int = 8
    longest: int = 77

    def __init__(self, folder: FilePath | None, module: nn.Module):
        self.folder, self.module = folder, module
        self._loaded: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    # ---- pictures

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(z - shift) scale, z the posterior's mean or, with noise, mean + std noise."""
        vae = self.part("vae")
        images = images.to(self.device, vae.dtype)
        posteriors = [self._posterior(vae, part) for part in images.split(self._rows(images.shape[-2:]))]
        z, std = (torch.cat(found) for found in zip(*posteriors))
        if noise is not None:
            z = z + std * noise.to(z)
        return (z - _shift(vae).to(z)) * _scale(vae).to(z)

    def decode(self, latents: Tensor) -> Tensor:
        """decode(x / scale + shift) [rows, 3, H, W]. With gradient, activations are made again in the backward pass."""
        vae = self.part("vae")
        z = latents.to(self.device, vae.dtype)
        z = z / _scale(vae).to(z) + _shift(vae).to(z)
        height, width = (side * self.factor for side in z.shape[-2:])
        parts = z.split(self._rows((height, width)))
        if torch.is_grad_enabled() and z.requires_grad:
            return torch.cat([checkpoint(self._pixels, vae, part, use_reentrant=False) for part in parts])
        return torch.cat([self._pixels(vae, part) for part in parts])

    @property
    def factor(self) -> int:
        """Pixels a latent, along one side; the usual number where the folder has no VAE."""
        file = None if self.folder is None else self.folder / "vae" / "config.json"
        if file is None or not file.is_file():
            return self.usual_factor
        return 2 ** (len(json.loads(file.read_text())[self.blocks]) - 1)

    def _posterior(self, vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that the VAE encodes pictures to."""
        found = vae.encode(images).latent_dist
        return found.mean, found.std

    def _pixels(self, vae: Any, z: Tensor) -> Tensor:
        return vae.decode(z, return_dict=False)[0]

    def _rows(self, size: Sequence[int]) -> int:
        return max(1, self.pixels_at_once // (size[0] * size[1]))

    # ---- prompts

    def prompts(self, texts: Sequence[str]) -> Cond:
        """The condition that the stock pipeline makes of these prompts."""
        raise NotImplementedError

    def null(self, cond: Cond) -> Cond:
        """The pipeline's own unconditional condition, with the rows of `cond`: that of `empty`."""
        rows = len(cond["prompt_embeds"])
        if "empty" not in self._loaded:
            self._loaded["empty"] = self.empty()
        empty = self._loaded["empty"].to(cond["prompt_embeds"].device)
        return cond.with_(**{n: v.expand(rows, *v.shape[1:]) for n, v in empty.items() if n != "time_ids"})

    def empty(self) -> Cond:
        """One row: the condition of the empty prompt."""
        return self.prompts([""])

    def text_pipeline(self) -> Any:
        """The stock pipeline with its text parts alone, for `encode_prompt`."""
        texts = {name: self.part(name) for name in self.classes if name != "vae"}
        if "pipeline" not in self._loaded:
            others = dict.fromkeys(("vae", self.network, "scheduler", *self.absent))
            found = getattr(import_module("diffusers"), self.pipeline)
            self._loaded["pipeline"] = found(**texts, **others, **self.options())
        return self._loaded["pipeline"]

    # ---- parts

    def parts(self) -> Mapping[str, Any]:
        """Every part and setting by its name in the stock pipeline's constructor; None where the folder has no such part."""
        found = {name: self.part(name) if self._has(name) else None for name in self.classes}
        return {**found, **dict.fromkeys(self.absent), **self.options()}

    def release(self) -> None:
        """Lets go of all parts; one that is asked for again is loaded again. Conditions that were remembered stay."""
        self._loaded = {name: found for name, found in self._loaded.items() if isinstance(found, Cond)}

    def options(self) -> dict[str, Any]:
        """Settings that the stock pipeline's constructor takes besides parts."""
        return {}

    def key(self) -> str:
        """Digest of the configs, vocabularies and weights of all parts that are there."""
        present = [self._place(name) for name in self.classes if self._has(name)]
        files = {f"{p.name}/{f.name}": f for p in present for f in p.iterdir() if f.suffix in _HASHED}
        return content_key(files)

    def part(self, name: str) -> Any:
        """A part on the network's device, loaded once. UserError when the folder has none, or a broken one."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name, self._place(name))
        found = self._loaded[name]
        return found.to(self.device) if isinstance(found, nn.Module) else found

    def index(self) -> Mapping[str, Any]:
        """The pipeline's settings in model_index.json; empty without one."""
        file = None if self.folder is None else self.folder / INDEX
        return json.loads(file.read_text()) if file is not None and file.is_file() else {}

    def _has(self, name: str) -> bool:
        return self.folder is not None and (self.folder / name).is_dir()

    def _place(self, name: str) -> FilePath:
        if self.folder is None:
            raise UserError(
                f"a network built from sizes has no {name}: write `from: FOLDER` with a pipeline folder that has {name}/"
            )
        if not self._has(name):
            raise UserError(f"'{self.folder}' has no {name}/: copy the pipeline's {name} folder there")
        return self.folder / name

    def _load(self, name: str, place: FilePath) -> Any:
        module_name, class_name = self.classes[name].split(":")
        try:
            with quiet(), torch.random.fork_rng():
                return _opened(getattr(import_module(module_name), class_name), place)
        except ImportError as error:
            raise UserError(
                f"{name} needs transformers, which is not installed: pip install 'fewstep[text]'"
            ) from error
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"cannot load {class_name} from '{place}': {str(error).strip().splitlines()[0]}") from error


def borrowed(source: str | None) -> FilePath | None:
    """The folder of a pipeline whose parts a network built from sizes uses; None without one, and where only its sizes
    are asked for. UserError when it is not here."""
    if source is None or torch.get_default_device().type == "meta":
        return None
    return find_model(source)


def _opened(found: Any, place: FilePath) -> Any:
    """A network in float32 and frozen, or a tokenizer."""
    if not issubclass(found, nn.Module):
        return found.from_pretrained(place, local_files_only=True)
    part = found.from_pretrained(place, use_safetensors=True, local_files_only=True)
    return part.float().eval().requires_grad_(False)


def _shift(vae: Any) -> Tensor:
    """What is taken off encoded pictures: one number, or one a channel [channels, 1, 1]."""
    by_channel = vae.config.get("latents_mean")
    return (
        torch.tensor(by_channel)[:, None, None] if by_channel else torch.tensor(vae.config.get("shift_factor") or 0.0)
    )


def _scale(vae: Any) -> Tensor:
    """What they are multiplied by then."""
    by_channel = vae.config.get("latents_std")
    return 1 / torch.tensor(by_channel)[:, None, None] if by_channel else torch.tensor(vae.config.scaling_factor)
