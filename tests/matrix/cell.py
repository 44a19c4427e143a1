"""One cell of the table: a recipe on a tiny pipeline, from the first step to the folder that diffusers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.engine.exporting import export_run
from fewstep.engine.trainer import Trainer
from fewstep.exporting.guidance_number import guidance_number
from fewstep.exporting.pipeline import load_pipeline
from fewstep.models.folder import card
from fewstep.recipe import Recipe, load_recipe
from tests.data.tiny_captions import tiny_captions
from tests.models.exported import drawn

from .families import Family
from .table import BASE, Row

TEXTS = ("a red cat", "2 dogs?")
BATCH = 4  # which every method can cut


class Places(NamedTuple):
    """A tiny pipeline, two captioned pictures and two prompts."""

    base: Path
    pictures: Path
    prompts: Path


def places(family: Family, root: Path) -> Places:
    """Written into `root`."""
    prompts = root / "prompts.txt"
    pictures = tiny_captions(root / "pictures", 2, family.pixels)
    prompts.write_text("\n".join(TEXTS) + "\n")
    return Places(family.tiny(root / "base"), pictures, prompts)


def recipe(row: Row, family: Family, at: Places, steps: int) -> Recipe:
    """The row's recipe on this family."""
    data: dict[str, Any] = {"source": "captions", "path": str(at.pictures), "size": family.pixels}
    if row.data_free and family.sized:
        data = {"source": "prompts", "path": str(at.prompts)}
    train = {"steps": steps, "batch": BATCH, "log_every": 1, "check_export": False}
    return load_recipe({"method": row.method, **_placed(row.said, at.base), "data": {"train": data}, "train": train})


def trained(row: Row, family: Family, at: Places, out: Path) -> Trainer:
    """A run of one step, gone on with from its checkpoint for a second one."""
    Trainer(recipe(row, family, at, 1), out, show=False).run()
    trainer = Trainer(recipe(row, family, at, 2), out, resume=True, show=False)
    trainer.run()
    return trainer


class Made(NamedTuple):
    """Images [2, 3, side, side] in 0..1 by the trainer and by the pipeline, and what fewstep.json says."""

    ours: Tensor
    theirs: Tensor
    said: Mapping[str, Any]


def made(trainer: Trainer, family: Family) -> Made:
    """The exported folder, loaded and sampled as its card says."""
    model = export_run(trainer)
    assert model is not None
    said, size = card(model), (family.pixels, family.pixels)
    prompts = trainer.method.sources["train"].fetch(torch.arange(2), None)["prompt"]
    scale = guidance_number(said["pipeline"], said["schedule"]["guidance"])
    theirs = drawn(load_pipeline(model, device="cpu"), len(said["schedule"]["u"]), scale, size, prompts)
    ours = trainer.method.samples(2, 0)
    assert ours is not None
    return Made((ours / 2 + 0.5).clamp(0, 1), theirs, said)


def _placed(said: Any, base: Path) -> Any:
    if isinstance(said, Mapping):
        return {name: _placed(value, base) for name, value in said.items()}
    return str(base) if said == BASE else said
