"""Students of the flow text-to-image families in stock pipelines: schedulers, folders, adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.draws import Draw
from fewstep.exporting.folder import export
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import addresses
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import target_for, training_path
from fewstep.maths.paths import Path as NoisePath
from fewstep.maths.solvers import Schedule, Target, sample
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import open_model
from fewstep.roles import merged

from .flow_stock import PROMPTS, SIDES, TINY, denoiser, latents, off, scheduled, student, with_module

NAMES = tuple(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each family."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny(root / name) for name, tiny in TINY.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "steps", "scheduler"),
    [
        ("ode", 1, "DPMSolverMultistepScheduler"),
        ("ode", 4, "DPMSolverMultistepScheduler"),
        ("renoise", 1, "FlowMatchLCMScheduler"),
        ("renoise", 2, "FlowMatchLCMScheduler"),
    ],
)
def test_exported_scheduler_makes_the_solvers_latents(folders, name, kind, steps, scheduler):
    """Asked for N steps alone, it steps on the levels that are trained: t = 3 u / (1 + 2 u) at u = 1, 1 - 1/N, ..."""
    teacher = denoiser(folders[name])
    path = training_path(teacher.family, teacher.path, lambda p: Schedule(kind, p.grid(steps)), False, True)
    schedule = Schedule(kind, path.grid(steps), guidance=3.0)
    target = target_for(teacher.family, path, schedule, labels=False, latent=True)
    assert target.scheduler == scheduler and path.shift == 3.0
    pipeline = scheduled(folders[name], target.scheduler_for(path, schedule))
    teacher.path = path
    draw = Draw.for_images(0, range(2))
    with torch.no_grad():
        ours = sample(teacher, schedule, teacher.handle.around.prompts(PROMPTS), draw, teacher.row_shape)
    given = addresses(Draw.for_images(0, range(2)))
    with given_noise(pipeline, given):
        theirs = latents(pipeline, None, 3.0, steps)
    assert off(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_more_than_two_renoising_steps_take_the_pipeline_that_folders_carry(folders, name):
    """No scheduler makes them from N alone; a student of any number of steps is offered for more than two."""
    teacher = denoiser(folders[name])
    for steps, second, offered in ((4, None, ()), (1, "zero", (1, 2, 4, 8, 50))):
        on = partial(renoising, steps, second)
        asked: dict[str, Any] = {"labels": False, "latent": True, "steps": offered}
        path = training_path(teacher.family, teacher.path, on, **asked)
        target = target_for(teacher.family, path, on(path), **asked)
        assert target.carried and target.scheduler == "FlowMatchLCMScheduler"


def renoising(steps: int, second: Target | None, path: NoisePath) -> Schedule:
    """The even schedule of a student that is told `second`."""
    return Schedule("renoise", path.grid(steps), target=second)


@pytest.mark.parametrize("name", NAMES)
def test_exported_student_makes_the_same_images_merged_and_as_an_adapter(folders, tmp_path, name):
    """The folder in diffusers alone, and its LoRA file on the stock pipeline of the base, time layers and all."""
    role = student(folders[name], ("s",), tune="lora", lora={"rank": 2}, moved=0.1)
    folder, images = exported(role, tmp_path / "m")
    assert open_model(folder).path == role.handle.path and list(folder.glob("*lora*"))
    reloaded = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert (drawn(reloaded) - images).abs().max() < 1e-4
    adapted = scheduled(folders[name], reloaded.scheduler)
    before = drawn(adapted)
    adapted.load_lora_weights(folder)
    with_adapter = drawn(adapted)
    adapted.unload_lora_weights()
    assert (with_adapter - images).abs().max() < 1e-4 and (before - images).abs().max() > 1e-3
    assert torch.equal(drawn(adapted), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_makes_the_same_images(folders, tmp_path, name):
    """Only diffusers, without fewstep."""
    folder, images = exported(student(folders[name], moved=0.02), tmp_path / "m")
    start = Draw.for_images(0, range(2)).normal("rollout.start", 4, 8, 8)
    assert reload_check(folder, 2 * images - 1, start, prompts=PROMPTS) < 1e-4


def exported(role: Denoiser, out: Path) -> tuple[Path, Tensor]:
    """The folder of a two-step student called at s = 0, and its images [2, 3, side, side] in 0..1 by our own solver."""
    path = training_path(role.family, role.path, lambda p: Schedule("ode", p.grid(2)), labels=False, latent=True)
    schedule, h = Schedule("ode", path.grid(2)), role.handle
    plain = with_module(role, merged(h))
    plain.path = h.path = path
    with torch.no_grad():
        x0 = sample(plain, schedule, h.around.prompts(PROMPTS), Draw.for_images(0, range(2)), role.row_shape)
        images = (h.around.decode(x0) / 2 + 0.5).clamp(0, 1)
    size = SIDES[role.family.facts.pipeline]
    said: dict[str, Any] = {"card": {"method": "toy", "size": size}, "adapter": h.adapter, "around": h.around}
    return export(merged(h), role.family, path, schedule, out, **said), images


def drawn(pipeline: Any) -> Tensor:
    """Two images [2, 3, side, side] in 0..1 from the noise of addresses."""
    with given_noise(pipeline, addresses(Draw.for_images(0, range(2)))):
        return torch.from_numpy(images_of(pipeline, 2, None, 2, 1.0, PROMPTS, SIDES[type(pipeline).__name__])).permute(
            0, 3, 1, 2
        )
