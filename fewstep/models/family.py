"""What the toolkit has to know about a base model: a record of facts and four small functions.

Facts are data, so that a new family is mostly a table row; what cannot be said in data (packing of latents, lists,
masks) is code in the family's own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from ..maths.losses import rows_mean
from ..maths.paths import Path
from ..nets.extra_inputs import attach


@dataclass(frozen=True)
class Loaded:
    """A network as it comes from a folder or a builder. `path` is None for networks that are no denoisers."""

    module: nn.Module
    family: str
    path: Path | None = None
    around: Surroundings | None = None


class Surroundings(Protocol):
    """The rest of the pipeline around a latent network: what turns pictures and prompts into what it reads, and back.

    Images are [rows, 3, height, width] in [-1, 1]. Everything here is frozen.
    """

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents as the network reads them; noise [rows, *latent] samples the VAE's posterior, None takes its mean."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents; gradients flow through. UserError when the pipeline holds no VAE."""

    def prompts(self, texts: Sequence[str]) -> Cond:
        """The condition that the stock pipeline makes of these prompts."""

    def null(self, cond: Cond) -> Cond:
        """The pipeline's own unconditional condition, with the rows of `cond`."""

    def parts(self) -> Mapping[str, Any]:
        """What the stock pipeline's constructor takes besides network and scheduler, by name: `vae`, `text_encoder`,
        `tokenizer`, ..., None for what there is none of, and its settings."""

    def key(self) -> str:
        """Hex digest of the encoders' weights; stores of latents and embeddings are keyed by it."""

    def release(self) -> None:
        """Lets go of all parts; one that is asked for again is loaded again. Conditions that were remembered stay."""


class Family(Protocol):
    """What roles and export ask of any family; diffusion families answer through `DiffusionFamily`."""

    name: str

    def build(self, **config: Any) -> Loaded:
        """A network with random weights, sized by the recipe's `build:`; unknown keys raise UserError."""

    def load(self, folder: FilePath) -> Loaded:
        """The network that `folder` holds, without running code from it."""

    def save(self, module: nn.Module, folder: FilePath) -> None:
        """Writes the network into `folder`, in its ecosystem's form."""

    def lora_targets(self, width: str) -> Sequence[str]:
        """Layer names for `lora.targets: default | wide | all`."""


@dataclass(frozen=True)
class Latent:
    """What the network's input is, against pixels: `channels`, spatial `factor` of the VAE, `patch` packed into channels,
    `multiple` that sizes must divide, temporal `frames` factor. Pixel families have factor 1. any_size: stock
    pipelines do not read the size off the network's config, and have to be told."""

    channels: int | None = None
    factor: int = 1
    patch: int = 1
    multiple: int = 1
    frames: int = 1
    any_size: bool = False


@dataclass(frozen=True)
class Facts:
    """The declarative part of a diffusion family.

    pipeline, component: the stock pipeline class and the name of the network in it.
    network: "module:Class" of the network.
    time_reversed: fed 1 - t.  time_dtype: dtype to which a pipeline casts t before the call (None: float32).
    sign: v = sign * output.  out_channels: "half" when the second half is a learned variance.
    vae_norm: how latents are scaled.  guidance: classifier-free, embedded as an input, or both.
    guidance_offset: usual scale - the pipeline's number.  guidance_rescale: "norm" where the pipeline renormalises.
    null: what stands for "no condition".  step_generator: the stock pipeline hands its generator to scheduler.step.
    lora_mixin, lora_prefix: of the stock LoRA loader, if any.  lora: layer names by width.
    scalar_slot: where a second scalar (time or guidance) can enter the stock class.
    time_embedding: name or pattern of the submodules whose output further scalars are added to.
    feature_layers: where discriminator heads read, deepest first.
    train_dropout: the class drops conditions by itself in train mode, so it is always held in eval mode.
    """

    pipeline: str
    component: Literal["unet", "transformer"]
    network: str
    time_reversed: bool = False
    time_dtype: str | None = None
    sign: Literal[1, -1] = 1
    out_channels: Literal["all", "half"] = "all"
    latent: Latent = Latent()
    vae_norm: Literal["none", "scale", "scale_shift", "mean_std", "batchnorm"] = "none"
    guidance: Literal["cfg", "embedded", "both", "none"] = "cfg"
    guidance_offset: float = 0.0
    guidance_rescale: Literal["none", "norm"] = "none"
    null: Literal["class", "empty_text", "zeros", "none"] = "class"
    step_generator: bool = True
    lora_mixin: str | None = None
    lora_prefix: str = ""
    lora: Mapping[str, Sequence[str]] = field(default_factory=dict)
    scalar_slot: Literal["timestep_cond", "guidance", "class_labels", "r_timestep"] | None = None
    time_embedding: str | None = None
    feature_layers: Sequence[str] = ()
    train_dropout: bool = False


def settings(module: nn.Module) -> Any:
    """The config of a diffusers network."""
    return module.config


class DiffusionFamily:
    """A family of denoising networks. Subclasses set `name` and `facts` and write `build`, `pack`, and what differs."""

    name: str
    facts: Facts

    def build(self, **config: Any) -> Loaded:
        """A network with random weights."""
        raise NotImplementedError

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether a network with this config.json is of the family."""
        return config.get("_class_name") == self.facts.network.split(":")[1]

    def load(self, folder: FilePath) -> Loaded:
        """Network and path from an exported or stock pipeline folder."""
        from .folder import load_component

        return load_component(self, folder)

    def save(self, module: nn.Module, folder: FilePath) -> None:
        """Writes `folder/<component>/` as diffusers does (safetensors and config.json)."""
        module.save_pretrained(folder / self.facts.component)  # type: ignore[operator]

    def lora_targets(self, width: str) -> Sequence[str]:
        """Layer names by width; "all" is every Linear and Conv2d."""
        if width == "all":
            return ["*"]
        if width not in self.facts.lora:
            raise UserError(f"family '{self.name}' names no layers for lora.targets: {width}; write all, or a list")
        return self.facts.lora[width]

    def upgrade(self, module: nn.Module, inputs: Sequence[str]) -> nn.Module:
        """The network with further inputs, fields of `cond` from then on; until trained it answers as before.

        UserError when the class has no place for one.
        """
        if self.facts.time_embedding is not None:
            return attach(module, inputs, self.facts.time_embedding)
        raise UserError(
            f"family '{self.name}' has no place for the input '{inputs[0]}': train it with one fixed guidance_scale"
        )

    def embeds_guidance(self, module: nn.Module) -> bool:
        """Whether one call of this base, told `guidance` [rows] of the condition, is already the guided field."""
        return False

    def sealed(self, module: nn.Module) -> nn.Module:
        """What is exported of a student that is sampled without guidance: a network on which the stock pipeline's
        guidance_scale, whose default is not 1, has no effect. The module itself where no such default exists."""
        return module

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Keyword arguments of the network's forward. `x` is the native state, `timestep` the label [rows]."""
        raise NotImplementedError

    def unpack(self, module: nn.Module, output: Any, x: Tensor) -> Tensor:
        """The network's answer in the shape of `x`."""
        sample = output.sample if hasattr(output, "sample") else output[0]
        return sample[:, : x.shape[1]] if self.facts.out_channels == "half" else sample

    def null(self, module: nn.Module, cond: Cond) -> Cond:
        """The condition that stands for "none", with the rows of `cond`. UserError: of prompts it takes the pipeline."""
        raise UserError(f"a {self.name} network alone has no unconditional branch: load it from a pipeline folder")

    def blank(self, module: nn.Module) -> Cond:
        """One row of a condition of the right shapes that means nothing, to ask a network for its sizes."""
        return Cond(label=torch.zeros(1, dtype=torch.long))

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[channels, height, width] of one row: the data's where it was told, else what the config says."""
        c = settings(module)
        return getattr(module, "latent_shape", (c.in_channels, c.sample_size, c.sample_size))

    def fit(self, module: nn.Module, shape: Sequence[int] | None) -> None:
        """A network of `latent.any_size` remembers the data's shape of a row; None where there are prompts alone."""
        if shape is not None and self.facts.latent.any_size:
            module.latent_shape = tuple(shape)  # type: ignore[assignment]

    def shape(self, module: nn.Module, cond: Cond) -> tuple[int, ...]:
        """Shape of one row for this condition, where it says one (a length); else `row_shape`."""
        return self.row_shape(module)

    def lengths(self, cond: Cond) -> Tensor | None:
        """Lengths [rows] of the samples that a condition asks for; None where all rows are of one shape."""
        return None

    def project(self, x: Tensor, cond: Cond) -> Tensor:
        """x [rows, ...] without what is no part of a sample (padding, a centre of mass): linear, and the same when repeated."""
        return x

    def mean_rows(self, x: Tensor, cond: Cond) -> Tensor:
        """Mean over those elements of each row that belong to a sample, [rows]."""
        return rows_mean(x)
