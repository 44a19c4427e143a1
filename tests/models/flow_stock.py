"""Flow text-to-image families twice: by diffusers' own pipelines, and by our flow states through a `Denoiser`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fewstep.maths.guidance import guided
from fewstep.models.denoiser import Denoiser
from fewstep.roles import Handle, Role, RoleSpec, assemble

from .stock import PROMPTS, denoiser, pretrained
from .tiny_sana import tiny_sana
from .tiny_sd3 import tiny_sd3

TINY: dict[str, Callable[..., Path]] = {"stable_diffusion_3": tiny_sd3, "sana": tiny_sana}
SIDES = {"StableDiffusion3Pipeline": None, "SanaPipeline": (32, 32)}  # that a pipeline has to be told
__all__ = [
    "PROMPTS",
    "SIDES",
    "TINY",
    "denoiser",
    "euler",
    "latents",
    "off",
    "pretrained",
    "scheduled",
    "student",
    "with_module",
]


def scheduled(folder: Path, scheduler: Any = None) -> Any:
    """diffusers' own pipeline with a scheduler: FlowMatchEuler with shift 3 unless another is given."""
    pipeline = copy.copy(pretrained(folder))
    pipeline.register_modules(scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipeline


def latents(pipeline: Any, noise: Tensor | None, guidance: float, steps: int = 4) -> Tensor:
    """What the stock pipeline makes of noise, or of its own."""
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    said: dict[str, Any] = {"height": side, "width": side, "latents": noise, "output_type": "latent"}
    if type(pipeline).__name__ == "SanaPipeline":
        said["use_resolution_binning"] = False
    return pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, **said).images


@torch.no_grad()
def euler(role: Denoiser, scheduler: Any, x: Tensor, guidance: float, sign: int = 1, reversed_: bool = False) -> Tensor:
    """x <- x + (t' - t) v over the levels that a pipeline left in its scheduler.

    sign, reversed_: wrong on purpose, the velocity's sign and the network's idea of time.
    """
    cond = role.handle.around.prompts(PROMPTS)
    for t, t_next in itertools.pairwise(scheduler.sigmas.tolist()):
        told = x.new_full((len(x),), 1 - t if reversed_ else t)
        x = x + (t_next - t) * sign * guided(role, x, told, cond, guidance)
    return x


def student(folder: Path, adds: tuple[str, ...] = (), moved: float = 0.0, **said: Any) -> Denoiser:
    """A role that starts from the folder's network, tuned as `said`; `moved`: noise on everything that trains."""
    roles = [Role("teacher"), Role("student", "full", "teacher", adds=adds)]
    specs = {"teacher": RoleSpec.model_validate({"from": str(folder)}), "student": RoleSpec.model_validate(said)}
    made = Denoiser.of(assemble(roles, specs, seed=0)["student"])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.handle.trainable().values():
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    return made


def with_module(role: Denoiser, module: Any) -> Denoiser:
    """The same role with another network."""
    h = role.handle
    return Denoiser.of(Handle(h.role, module, h.spec, "frozen", None, h.family, h.path, None, h.around))


def off(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
