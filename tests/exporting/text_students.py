"""Tiny text-to-image students: a pipeline folder, its network made different, and images by our own solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.draws import Draw
from fewstep.exporting.folder import export
from fewstep.exporting.targets import training_path
from fewstep.maths.solvers import Kind, Schedule, sample
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import open_model
from fewstep.models.registry import FAMILIES
from fewstep.nets.lora import Adapter
from fewstep.roles import Handle, Role, RoleSpec, merged
from tests.models.tiny_sd import Kind as Model
from tests.models.tiny_sd import tiny_sd

from .students import on_grid

PROMPTS = ["a cat", "a dog on a bench", ""]


@dataclass
class TextStudent:
    """A role of a latent pipeline in `base`, and its schedule."""

    base: Path
    handle: Handle
    schedule: Schedule
    prompts: Sequence[str] = field(default_factory=lambda: PROMPTS)

    def latents(self, guidance: float | None = None, seed: int = 0) -> Tensor:
        """One latent a prompt by `maths.solvers.sample`."""
        denoiser = Denoiser.of(self.handle)
        assert self.handle.around is not None
        schedule = self.schedule if guidance is None else replace(self.schedule, guidance=guidance)
        draw = Draw.for_images(seed, range(len(self.prompts)))
        return sample(denoiser, schedule, self.handle.around.prompts(self.prompts), draw, denoiser.row_shape)

    @torch.no_grad()
    def images(self, guidance: float | None = None, seed: int = 0) -> Tensor:
        """[n, 3, height, width] in 0..1."""
        assert self.handle.around is not None
        return (self.handle.around.decode(self.latents(guidance, seed)) / 2 + 0.5).clamp(0, 1)

    def export(self, out: Path, **card: Any) -> Path:
        """Its checkpoint folder."""
        family = FAMILIES.get(str(self.handle.family))
        module = merged(self.handle)
        said = {"method": "toy", **card}
        return export(
            module,
            family,
            self.handle.path,
            self.schedule,
            out,
            card=said,
            adapter=self.handle.adapter,
            around=self.handle.around,
        )


def text_student(
    folder: Path,
    model: Model = "sd15",
    kind: Kind = "renoise",
    steps: int = 4,
    guidance: float = 1.0,
    embedded: bool = False,
    origin: int | None = None,
    lora: bool = False,
) -> TextStudent:
    """A student of the tiny pipeline that is written into `folder`: all weights moved, or an adapter."""
    loaded = open_model(tiny_sd(folder, model))
    family = FAMILIES.get(loaded.family)
    module = loaded.module.eval().requires_grad_(False)
    module = family.upgrade(module, ["guidance"]) if embedded else module
    torch.manual_seed(1)
    adapter = Adapter(module, 4, 8.0, family.lora_targets("wide")) if lora else None
    _moved(adapter if adapter is not None else module)
    assert loaded.path is not None
    on = on_grid(kind, steps, guidance, origin, embedded)
    path = training_path(family, loaded.path, on, labels=False, latent=True)
    role, spec = Role("student"), RoleSpec()
    handle = Handle(role, module, spec, "frozen", adapter, loaded.family, path, str(folder), loaded.around)
    return TextStudent(folder, handle, on(path))


@torch.no_grad()
def _moved(module: nn.Module) -> None:
    """Away from what the base has; the guidance input, which begins at zero, counts too."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
