"""A tiny text world for the language methods: a corpus, two teachers in folders, recipes, and single steps by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.engine.trainer import Trainer
from fewstep.methods.base import Mean, Method, Update
from fewstep.models.text_encoder import TEXT_ENCODER
from fewstep.recipe import load_recipe

NOUNS = {"beast": ("cat", "dog", "horse"), "bird": ("crow", "finch", "owl"), "fish": ("carp", "eel", "shark")}
VERBS = ("eats in", "rests near", "leaves")
PLACES = ("the old tree", "a lake", "the wide cold sea")
LENGTH = 12
SIZES = {"vocab_size": 90, "hidden": 16, "layers": 4, "heads": 2, "intermediate": 32, "max_length": 16, "dropout": 0.0}
SMALL = {**SIZES, "hidden": 8, "layers": 2}


def write(folder: Path) -> None:
    """corpus.txt, task.tsv (three classes, 81 rows), and the teachers `pretrained` and `finetuned`."""
    task = [
        (label, f"the {noun} {verb} {place}")
        for label, nouns in NOUNS.items()
        for noun in nouns
        for verb in VERBS
        for place in PLACES
    ]
    (folder / "corpus.txt").write_text("".join(f"{text}\n" for _, text in task))
    (folder / "task.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in task))
    teacher(folder / "pretrained", seed=1)
    teacher(folder / "finetuned", seed=2, classes=3)


def teacher(folder: Path, seed: int, **sizes: Any) -> None:
    """A folder that holds an encoder with large random weights, so that its attention is far from uniform."""
    torch.manual_seed(seed)
    module = TEXT_ENCODER.build(**{**SIZES, **sizes}).module
    for p in module.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.3)
    TEXT_ENCODER.save(module, folder)
    (folder / "fewstep.json").write_text('{"family": "text_encoder"}')


def recipe(folder: Path, method: str = "ernie_tiny", **changes: Any) -> dict[str, Any]:
    """A recipe on the world in `folder`; `changes` replace top-level keys."""
    text = {"tokenizer": {"corpus": str(folder / "corpus.txt"), "vocab_size": 90}, "length": LENGTH}
    task = {"source": "text_labels", "path": str(folder / "task.tsv"), **text}
    general = {"source": "text_lines", "path": str(folder / "corpus.txt"), **text}
    student = {"from": "text_encoder", "build": SMALL, "optimizer": {"lr": 3e-3}}
    said: dict[str, Any] = {"method": method, "student": student, "train": {"steps": 2, "batch": 8, "log_every": 1}}
    if method == "ernie_tiny":
        said |= {name: str(folder / name) for name in ("pretrained", "finetuned")}
        said |= {name: {"optimizer": {"lr": 3e-3}} for name in ("projectors", "head")}
        said |= {"data": {"general": general, "task": task}}
        said |= {"stages": {name: {"batch": 8, "lr": 1.0} for name in ("gd", "ged", "tad", "tsd")}}
    else:
        said |= {"head": {"optimizer": {"lr": 3e-3}}}
        said |= {"data": {"train": task if method == "text_classify" else general}}
    return {**said, **changes}


def trained(said: Mapping[str, Any], out: Path, resume: bool = False) -> Trainer:
    """Runs a recipe to its end, without export."""
    trainer = Trainer(load_recipe(said), out, resume=resume, show=False)
    trainer.run()
    return trainer


def bound(said: Mapping[str, Any], out: Path) -> Method:
    """The method with its networks and sources, before the first step."""
    return Trainer(load_recipe(said), out, show=False).method


def rows(method: Method, source: str, count: int = 6) -> Batch:
    """The first rows of a source."""
    ids = torch.arange(count)
    return Batch(ids, method.sources[source].fetch(ids, None))


def step(method: Method, stage: str, batch: Batch, draw: Any = None) -> Update:
    """The update that one micro-batch, being the whole step, yields in a stage."""
    (run,) = [s.step for s in method.stages() if s.name == stage]
    generator = run(batch, draw)
    said = next(generator)
    return said if isinstance(said, Update) else generator.send(dict(said))  # type: ignore[attr-defined, arg-type]


def terms(update: Update) -> dict[str, Tensor]:
    """The terms as the trainer adds them up."""
    return {
        name: loss.value.sum() / loss.total.clamp(min=1) if isinstance(loss, Mean) else loss.mean()
        for name, loss in update.losses.items()
    }
