"""Small flow networks with known answers: Gaussians and mixtures in closed form, and an MLP for points in the plane.

Every method is held against them. They are families like any other (`teacher: {from: gaussian, build: {...}}`), on rows
[rows, dim], with class labels 0..classes-1 and the null class `classes`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path as FilePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from .build import parse
from .family import DiffusionFamily, Facts, Loaded
from .folder import path_from
from .times import TIMES, read_times

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TIME_SCALE = 1000.0  # networks are fed 1000 t


class OracleNet(nn.Module):
    """Base of the three networks: remembers its sizes, so that a folder can rebuild it. `null` is the last class."""

    def __init__(self, config: BaseModel, classes: int, dim: int):
        super().__init__()
        self.config, self.null, self.dim = config.model_dump(), classes, dim


class MixtureNet(OracleNet):
    """Velocity of class-conditional mixtures of isotropic Gaussians, exact.

    With A_k = (1-t)^2 s_k^2 + t^2 and d_k = x - (1-t) m_k, component k alone has
    v_k = -m_k + (t - (1-t) s_k^2) / A_k d_k, and v = sum_k r_k v_k with r = softmax(log w_k - |d_k|^2 / (2 A_k)
    - dim/2 log A_k). means [classes+1, parts, dim], log_std and logits [classes+1, parts] are parameters, so that one
    such network can also be fitted to another.
    """

    def __init__(self, config: BaseModel, means: Tensor, std: Tensor, weights: Tensor):
        super().__init__(config, len(means) - 1, means.shape[-1])
        self.means = nn.Parameter(means)
        self.log_std = nn.Parameter(std.log())
        self.logits = nn.Parameter(weights.log())

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """v at x [rows, dim], timestep = 1000 t [rows], label [rows]."""
        t = (timestep / TIME_SCALE).reshape(-1, 1, 1)
        means, variance = self.means[label], (2 * self.log_std[label]).exp()[..., None]
        spread = (1 - t) ** 2 * variance + t**2
        offset = x[:, None] - (1 - t) * means
        parts = (t - (1 - t) * variance) / spread * offset - means
        fit = (offset**2 / spread + spread.log()).sum(2)
        share = torch.softmax(self.logits[label] - fit / 2, dim=1)
        return (share[..., None] * parts).sum(1)

    @torch.no_grad()
    def data(self, label: Tensor, generator: torch.Generator) -> Tensor:
        """Samples of the clean distribution, one a label: [rows, dim]."""
        part = torch.multinomial(torch.softmax(self.logits[label], 1), 1, generator=generator)[:, 0]
        noise = torch.randn(len(label), self.dim, generator=generator)
        return self.means[label, part] + self.log_std[label, part].exp()[:, None] * noise


class GaussianNet(MixtureNet):
    """One isotropic Gaussian a class: v = -m + (t - (1-t) s^2) / A (x - (1-t) m)."""


class MLPNet(OracleNet):
    """A flow network for points: Fourier features of t and an embedded label are added to every hidden layer."""

    rates: Tensor

    def __init__(self, config: MLPConfig):
        super().__init__(config, config.classes, config.dim)
        width = config.width
        self.enter = nn.Linear(config.dim, width)
        self.time = nn.Linear(2 * config.frequencies, width)
        self.label = nn.Embedding(config.classes + 1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))
        self.leave = nn.Linear(width, config.dim)
        self.register_buffer("rates", math.pi * 2.0 ** torch.arange(config.frequencies), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """The output at x [rows, dim], timestep [rows] in 0..1000, label [rows]."""
        angle = timestep[:, None] / TIME_SCALE * self.rates
        place = self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(label)
        h = self.enter(x)
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h + place))
        return self.leave(nn.functional.silu(h))


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GaussianConfig(_Config):
    """means [classes][dim], std [classes]; the null class has `null_mean`, `null_std` (default: averages)."""

    means: list[list[float]] = [[0.0]]
    std: list[float] = [1.0]
    null_mean: list[float] | None = None
    null_std: float | None = None

    def network(self) -> GaussianNet:
        """The network of these sizes."""
        means, std = torch.tensor(self.means), torch.tensor(self.std)
        if means.ndim != 2 or len(means) != len(std):
            raise UserError("gaussian build: means and std need one entry a class, each mean a list of numbers")
        null_mean = means.mean(0) if self.null_mean is None else torch.tensor(self.null_mean)
        null_std = std.mean() if self.null_std is None else torch.tensor(self.null_std)
        means, std = torch.cat([means, null_mean[None]]), torch.cat([std, null_std[None]])
        return GaussianNet(self, means[:, None], std[:, None], torch.ones(len(std), 1))


class GaussianMixtureConfig(_Config):
    """means [parts][dim] and std [parts] are shared; weights [classes][parts] differ, null is their mean."""

    means: list[list[float]] = [[-1.0, 0.0], [1.0, 0.0]]
    std: list[float] = [0.3, 0.3]
    weights: list[list[float]] | None = None

    def network(self) -> MixtureNet:
        """The network of these sizes."""
        means, std = torch.tensor(self.means), torch.tensor(self.std)
        weights = torch.ones(1, len(std)) if self.weights is None else torch.tensor(self.weights)
        if means.ndim != 2 or len(means) != len(std) or weights.shape[-1] != len(std):
            raise UserError("gaussian_mixture build: means, std and each row of weights need one entry a part")
        weights = weights / weights.sum(1, keepdim=True)
        weights = torch.cat([weights, weights.mean(0, keepdim=True)])
        rows = len(weights)
        return MixtureNet(self, means.expand(rows, -1, -1).clone(), std.expand(rows, -1).clone(), weights)


class MLPConfig(_Config):
    """Sizes of an MLPNet. `path` is `{kind: flow | vp, ...}`."""

    dim: int = 2
    classes: int = 1
    width: int = 64
    depth: int = 2
    frequencies: int = 4
    path: dict[str, Any] = {"kind": "flow"}

    def network(self) -> MLPNet:
        """The network of these sizes."""
        return MLPNet(self)


class OracleFamily(DiffusionFamily):
    """Networks of this file: saved as config.json and model.safetensors; no pipeline of diffusers runs them."""

    def __init__(self, name: str, config: type[GaussianConfig | GaussianMixtureConfig | MLPConfig], facts: Facts):
        self.name, self._config, self.facts = name, config, facts

    def build(self, **config: Any) -> Loaded:
        """The network of these sizes, on a flow path unless `path` says otherwise. UserError when they do not fit."""
        said: Any = parse(self._config, config, f"{self.name} build")
        return Loaded(said.network(), self.name, path_from(getattr(said, "path", {"kind": "flow"})))

    def save(self, module: nn.Module, folder: FilePath) -> None:
        """Writes config.json and model.safetensors into `folder/transformer`."""
        from safetensors.torch import save_file

        place = folder / self.facts.component
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}, place / WEIGHTS)
        written = {"_class_name": type(module).__name__, "build": module.config}
        (place / CONFIG).write_text(json.dumps(written, indent=2))

    def load(self, folder: FilePath) -> Loaded:
        """The network in `folder`. UserError when a file is missing or the weights do not fit the sizes."""
        from safetensors.torch import load_file

        place = folder / self.facts.component
        missing = [name for name in (CONFIG, WEIGHTS) if not (place / name).is_file()]
        if missing:
            raise UserError(f"'{place}' has no {missing[0]}: a {self.name} folder holds {CONFIG} and {WEIGHTS}")
        loaded = self.build(**json.loads((place / CONFIG).read_text())["build"])
        try:
            loaded.module.load_state_dict(load_file(place / WEIGHTS))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"'{place / WEIGHTS}' does not fit {CONFIG}: {reason}") from error
        if (folder / TIMES).is_dir():
            read_times(loaded.module, folder / TIMES)
        return loaded

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """(x, timestep, label)."""
        return {"x": x, "timestep": timestep, "label": cond["label"]}

    def unpack(self, module: nn.Module, output: Tensor, x: Tensor) -> Tensor:
        """The networks answer plain tensors."""
        return output

    def null(self, module: nn.Module, cond: Cond) -> Cond:
        """Label `classes`."""
        return cond.with_(label=torch.full_like(cond["label"], int(module.null)))  # type: ignore[arg-type]

    def row_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[dim]"""
        return (module.dim,)  # type: ignore[return-value]


def _facts(network: str, **more: Any) -> Facts:
    return Facts(pipeline="", component="transformer", network=f"{__name__}:{network}", step_generator=False, **more)


GAUSSIAN = OracleFamily("gaussian", GaussianConfig, _facts("GaussianNet"))
GAUSSIAN_MIXTURE = OracleFamily("gaussian_mixture", GaussianMixtureConfig, _facts("MixtureNet"))
MLP = OracleFamily(
    "mlp",
    MLPConfig,
    _facts(
        "MLPNet",
        lora={"default": ("hidden.*",), "wide": ("hidden.*", "enter", "time", "leave")},
        time_embedding="time",
        feature_layers=("hidden.0",),
    ),
)
