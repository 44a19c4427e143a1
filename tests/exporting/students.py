"""Tiny students with random weights, and their images by our own solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.exporting.folder import export
from fewstep.exporting.targets import training_path
from fewstep.maths.consistency import pick
from fewstep.maths.paths import Path as NoisePath
from fewstep.maths.solvers import Kind, Schedule, sample
from fewstep.models.denoiser import Denoiser
from fewstep.models.family import DiffusionFamily
from fewstep.models.registry import FAMILIES
from fewstep.roles import Handle, Role, RoleSpec

FLOW = {"kind": "flow"}
SHIFTED = {"kind": "flow", "shift": 3.0}
EPS = {
    "kind": "vp",
    "beta_schedule": "linear",
    "beta_end": 0.01,
}  # ends at abar = .0066, so that x0 = (x - s e)/a is tame
VPRED = {
    "kind": "vp",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}
SIZES: dict[str, dict[str, Any]] = {
    "unet2d": {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention": "none"},
    "dit": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "learned_sigma": True},
}


@dataclass
class Student:
    """A network on the path it would be trained on, and its schedule."""

    family: DiffusionFamily
    module: nn.Module
    path: NoisePath
    schedule: Schedule
    classes: int | None

    def labels(self, n: int) -> Tensor | None:
        """0, 1, 2, 0, ..."""
        return None if self.classes is None else torch.arange(n) % self.classes

    def images(self, n: int, seed: int = 0) -> Tensor:
        """[n, channels, size, size] in 0..1 by `maths.solvers.sample`."""
        handle = Handle(Role("student"), self.module, RoleSpec(), "frozen", None, self.family.name, self.path)
        labels = self.labels(n)
        cond = Cond() if labels is None else Cond(label=labels)
        draw = Draw.for_images(seed, range(n))
        x = sample(Denoiser.of(handle), self.schedule, cond, draw, self.family.row_shape(self.module))
        return (x / 2 + 0.5).clamp(0, 1)

    def export(self, out: Path, **card: Any) -> Path:
        """Its checkpoint folder."""
        return export(self.module, self.family, self.path, self.schedule, out, card={"method": "toy", **card})


def student(
    family: str = "unet2d",
    path: dict[str, Any] = FLOW,
    kind: Kind = "ode",
    steps: int = 4,
    guidance: float = 1.0,
    classes: int | None = 3,
    origin: int | None = None,
) -> Student:
    """A student whose schedule is the grid of `training_path`, or picked from the grid of `origin` levels."""
    torch.manual_seed(0)
    loaded = FAMILIES.get(family).build(sample_size=8, classes=classes, path=path, **SIZES[family])
    with torch.no_grad():
        for parameter in loaded.module.parameters():  # diffusers starts DiT's last layers at zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert loaded.path is not None
    on = on_grid(kind, steps, guidance, origin)
    trained = training_path(FAMILIES.get(family), loaded.path, on, labels=classes is not None)
    return Student(FAMILIES.get(family), loaded.module.eval(), trained, on(trained), classes)


def on_grid(
    kind: Kind, steps: int, guidance: float = 1.0, origin: int | None = None, embedded: bool = False
) -> Callable[[NoisePath], Schedule]:
    """The schedule of `steps` levels of a path's own grid, or picked from its grid of `origin` levels."""
    return lambda path: Schedule(
        kind, pick(path.grid(origin or steps), steps), guidance, embedded=embedded, origin=origin
    )
