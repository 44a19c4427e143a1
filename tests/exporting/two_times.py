"""Tiny students with two times, whose answers depend on the second one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.exporting.targets import training_path
from fewstep.maths.paths import Path as NoisePath
from fewstep.maths.solvers import Schedule
from fewstep.methods.diffusion.any_step import OFFERED, SAMPLERS, Sampler
from fewstep.models.registry import FAMILIES
from fewstep.nets.extra_inputs import reads

from .students import SHIFTED, SIZES, Student


def two_times(
    family: str = "unet2d",
    sampler: Sampler = "any",
    guidance: float = 1.0,
    path: dict[str, Any] = SHIFTED,
    inputs: tuple[str, ...] = ("s", "sign"),
    offered: tuple[int, ...] = OFFERED,
    **more: Any,
) -> Student:
    """A four-step student of `sampler` that reads `inputs`; `more` words of its schedule."""
    torch.manual_seed(0)
    known = FAMILIES.get(family)
    loaded = known.build(sample_size=8, classes=3, path=path, **SIZES[family])
    module = moved(known.upgrade(loaded.module, inputs))
    kind, target = SAMPLERS[sampler]

    def on(path: NoisePath) -> Schedule:
        return Schedule(kind, path.grid(4), guidance, target=target, **more)

    assert loaded.path is not None
    trained = training_path(known, loaded.path, on, reads=reads(module), steps=offered)
    return Student(known, module.eval(), trained, on(trained), 3)


@torch.no_grad()
def moved(module: nn.Module) -> nn.Module:
    """`module` itself, away from its start: diffusers starts some layers at zero, as extra inputs do."""
    for name, parameter in module.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.2 if name.startswith("extra_inputs") else 0.05))
    return module


def images(student: Student, n: int, steps: int) -> Tensor:
    """[n, channels, size, size] in 0..1 by our own solver, in other numbers of steps."""
    return replace(student, schedule=replace(student.schedule, u=student.path.grid(steps))).images(n)
