"""Students of the flow text-to-image families in stock pipelines: schedulers, folders, adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.draws import Draw
from fewstep.exporting.fresh import given_noise
from fewstep.exporting.pipeline import addresses
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import target_for, training_path
from fewstep.maths.paths import Path as NoisePath
from fewstep.maths.solvers import Schedule, Target, sample
from fewstep.models.folder import open_model

from .exported import drawn, exported
from .flow_stock import PROMPTS, SIDES, TINY, denoiser, latents, off, scheduled, student

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
    size = SIDES[role.family.facts.pipeline]
    folder, images = exported(role, tmp_path / "m", size=size)
    assert open_model(folder).path == role.handle.path and list(folder.glob("*lora*"))
    reloaded = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert (drawn(reloaded, size=size) - images).abs().max() < 1e-4
    adapted = scheduled(folders[name], reloaded.scheduler)
    before = drawn(adapted, size=size)
    adapted.load_lora_weights(folder)
    with_adapter = drawn(adapted, size=size)
    adapted.unload_lora_weights()
    assert (with_adapter - images).abs().max() < 1e-4 and (before - images).abs().max() > 1e-3
    assert torch.equal(drawn(adapted, size=size), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_makes_the_same_images(folders, tmp_path, name):
    """Only diffusers, without fewstep."""
    role = student(folders[name], moved=0.02)
    folder, images = exported(role, tmp_path / "m", size=SIDES[role.family.facts.pipeline])
    start = Draw.for_images(0, range(2)).normal("rollout.start", 4, 8, 8)
    assert reload_check(folder, 2 * images - 1, start, prompts=PROMPTS) < 1e-4
