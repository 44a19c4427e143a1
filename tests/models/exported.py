"""A latent student as a folder: its images by our own solver, and by the stock pipeline in the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.draws import Draw
from fewstep.exporting.folder import export
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import addresses
from fewstep.exporting.targets import training_path
from fewstep.maths.solvers import Kind, Schedule, sample
from fewstep.models.denoiser import Denoiser
from fewstep.roles import merged

from .flow_stock import with_module
from .stock import PROMPTS

SHAPE = (4, 8, 8)  # of the tiny pipelines' latents
SIZE = (16, 16)  # in pixels, of most


def exported(
    role: Denoiser,
    out: Path,
    kind: Kind = "ode",
    steps: int = 2,
    size: Sequence[int] | None = SIZE,
    prompts: Sequence[str] = PROMPTS,
    **said: Any,
) -> tuple[Path, Tensor]:
    """The folder of a student, and its images [prompts, 3, height, width] in 0..1 by our own solver.

    The role's path becomes the one on which the folder is sampled. size: in pixels. said: further words of the schedule.
    """
    h = role.handle

    def on(path: Any) -> Schedule:
        return Schedule(kind, path.grid(steps), **said)

    h.path = path = training_path(role.family, h.path, on, labels=False, latent=True)
    plain = with_module(role, merged(h) if h.adapter else h.module)
    with torch.no_grad():
        x0 = sample(plain, on(path), h.around.prompts(prompts), Draw.for_images(0, range(len(prompts))), SHAPE)
        images = (plain.decode(x0) / 2 + 0.5).clamp(0, 1)
    about: dict[str, Any] = {"card": {"method": "toy", "size": size}, "adapter": h.adapter, "around": h.around}
    return export(plain.handle.module, role.family, path, on(path), out, **about), images


def drawn(
    pipeline: Any,
    steps: int | None = 2,
    guidance: float | None = 1.0,
    size: Sequence[int] | None = SIZE,
    prompts: Sequence[str] = PROMPTS,
) -> Tensor:
    """Images [prompts, 3, height, width] in 0..1 from the noise of addresses. What is None is left to the pipeline."""
    with given_noise(pipeline, addresses(Draw.for_images(0, range(len(prompts))))):
        images = images_of(pipeline, len(prompts), None, steps, guidance, prompts, size)
    return torch.from_numpy(images).permute(0, 3, 1, 2)
