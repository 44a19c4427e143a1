"""The same samples twice: by diffusers' own pipelines, and by our flow states through a `Denoiser`."""

from __future__ import annotations

import copy
import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.maths.guidance import guided
from fewstep.maths.paths import VPPath
from fewstep.maths.solvers import step
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import open_model
from fewstep.roles import Handle, Role, RoleSpec

PROMPTS = ["a red cat", "2 dogs?"]


def denoiser(folder: Path, path: VPPath | None = None) -> Denoiser:
    """The network of a folder, as a method sees it."""
    loaded = open_model(folder)
    given = Handle(
        Role("teacher"),
        loaded.module,
        RoleSpec(),
        "frozen",
        None,
        loaded.family,
        path or loaded.path,
        None,
        loaded.around,
    )
    return Denoiser.of(given)


def stock(folder: Path, scheduler: str = "ddim", unet: Any = None, steps: int = 4) -> Any:
    """diffusers' own pipeline with a few-step scheduler, maybe with another network."""
    pipeline = copy.copy(pretrained(folder))
    config, lcm = dict(pipeline.scheduler.config), {"original_inference_steps": steps, "timestep_scaling": 1e4}
    made = LCMScheduler.from_config(config, **lcm) if scheduler == "lcm" else DDIMScheduler.from_config(config)
    pipeline.register_modules(scheduler=made, unet=pipeline.unet if unet is None else unet)
    return pipeline


@lru_cache
def pretrained(folder: Path) -> Any:
    """A pipeline folder as diffusers loads it."""
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, noise: Tensor, guidance: float, steps: int = 4) -> Tensor:
    """What the stock pipeline makes of native noise."""
    return pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images


@torch.no_grad()
def own(
    role: Denoiser, noise: Tensor, guidance: float, kind: str = "ode", steps: int = 4, cond: Cond | None = None
) -> Tensor:
    """The same from flow states: guided x0, then `step`."""
    cond = role.handle.around.prompts(PROMPTS) if cond is None else cond
    generator = torch.Generator().manual_seed(7)
    x, levels = role.path.start(noise), (*role.path.grid(steps), 0.0)
    for u, u_next in itertools.pairwise(levels):
        t, t_next = role.path.time(u), role.path.time(u_next) if u_next else 0.0
        x0 = guided(role, x, torch.full((len(x),), t), cond, guidance, what="x0")
        fresh = torch.randn(x.shape, generator=generator) if kind == "renoise" and u_next else None
        x = step(kind, x, x0, t, t_next, fresh)
    return x
