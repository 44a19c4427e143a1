"""Two toy methods that exercise the contract: a denoiser, and an alternating game with totals, stores and dropout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.engine import checkpoint, snapshot
from fewstep.engine.trainer import Trainer
from fewstep.maths.solvers import Schedule
from fewstep.methods.base import DiffusionMethod, Levels, Mean, Method, MethodConfig, Stage, Total, Update
from fewstep.methods.registry import METHODS
from fewstep.recipe import load_recipe
from fewstep.roles import Role

UNET = {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4, "attention": "none"}


class ToyDenoise(DiffusionMethod):
    """Flow matching in two lines."""

    name = "toy_denoise"

    def roles(self):
        return (Role("student", tune="full"),)

    def train_step(self, batch, draw) -> Iterator[Update]:
        eps, t = draw.normal("eps", *batch.x0.shape[1:]), draw.uniform("t")
        error = self.student.denoising_loss(batch.x0, eps, t, batch.cond)
        yield Update("student", {"denoise": error}, levels={"denoise": Levels(error, t)})

    def schedule(self):
        return Schedule("ode", self.student.path.grid(2))


class Head(nn.Module):
    """Linear with dropout, so that global generators matter."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.2), nn.Linear(width, 10)

    def forward(self, x):
        return self.linear(self.drop(x.flatten(1)))


class ToyGame(Method):
    """Two roles that step in turn, a global normaliser, kept rows, two stages."""

    name = "toy_game"

    class Config(MethodConfig):
        nan_at: int | None = None

    def roles(self):
        return (
            Role("student", tune="full", build=lambda _: Head(), train_mode=True),
            Role("critic", tune="full", build=lambda _: Head(), train_mode=True),
        )

    def store_names(self):
        return ("outputs",)

    def stages(self):
        return (
            Stage("first", self.train_step, trains=("student", "critic"), steps=10, writes=("outputs",)),
            Stage("second", self.train_step, trains=("student", "critic"), lr=0.5, writes=("outputs",)),
        )

    def train_step(self, batch, draw):
        label = batch.cond["label"]
        mask = (label != 3).float()
        n = yield Total(rows=mask.sum())
        out = self.student(batch.x0)
        rows = nn.functional.cross_entropy(out, label, reduction="none") * mask
        if self.config.nan_at == draw.step:
            rows = rows * float("nan")
        yield Update("student", {"ce": Mean(rows, n["rows"])}, keep={"outputs.logits": out}, metrics={"rows": rows})
        seen = self.critic(batch.x0)
        yield Update("critic", {"match": (seen - self.student(batch.x0).detach()).square().mean(1)})

    def exported(self):
        return "nothing"


def register(monkeypatch: Any = None) -> None:
    """Puts the toys into the table of methods."""
    for cls in (ToyDenoise, ToyGame):
        METHODS.table[cls.name] = f"{__name__}:{cls.__name__}"
    sys.modules.setdefault(__name__, sys.modules[__name__])


def recipe(method: str = "toy_denoise", **train: Any) -> dict[str, Any]:
    """A small recipe on real digits."""
    student = {"from": "unet2d", "build": UNET} if method == "toy_denoise" else {}
    sizes = {"steps": 8, "batch": 16, "log_every": 2, **train}
    student |= {"optimizer": {"lr": 1e-3, "warmup": 4, "decay": "cosine"}, "ema": 0.9}
    return {"method": method, "student": student, "data": {"train": {"source": "digits"}}, "train": sizes}


def trained(said: dict[str, Any], folder: Path, resume: bool = False) -> Trainer:
    """Runs a recipe to its end, without export."""
    trainer = Trainer(load_recipe(said), folder, resume=resume, show=False)
    trainer.run()
    return trainer


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def hashes(trainer: Trainer) -> dict[str, str]:
    """sha256 of every role, EMA, optimiser, feed and store."""
    return {name: checkpoint.digest(tensors) for name, tensors in snapshot.files(trainer).items()}


def largest_difference(a: Trainer, b: Trainer) -> float:
    """Over all parameters of all trained roles."""
    worst = 0.0
    for name, handle in a.handles.items():
        other = b.handles[name].state()
        worst = max(worst, *((handle.state()[n].float() - other[n].float()).abs().max().item() for n in other))
    return worst


register()
