"""What a checkpoint holds of a run: every trained role, EMA, optimiser, feed, store, and the place in the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..roles import Handle, part_of
from . import distributed
from .checkpoint import Checkpoint
from .sharding import whole

if TYPE_CHECKING:
    from .trainer import Trainer

FORMAT = 1
NOISE = "fn1"  # version of the addressed random numbers: another one would change what a resumed run draws


@dataclass
class Place:
    """Where in a run we are: stage number, optimiser steps done in it, and over all stages."""

    stage: int = 0
    step: int = 0
    total: int = 0


def files(trainer: Trainer) -> dict[str, Mapping[str, Tensor]]:
    """The tensors, by file name without its ending. All processes have to ask, since parts of networks are put together."""
    found: dict[str, Mapping[str, Tensor]] = {"method": trainer.method.state()}
    for name, handle in trainer.handles.items():
        if handle.tune != "frozen":
            found[f"{name}.role"] = handle.state()
        if handle.ema is not None:
            found[f"{name}.ema"] = handle.ema
    found.update({f"{name}.optimizer": optimizer.state() for name, optimizer in trainer.optimizers.items()})
    found.update({f"feed.{name}": feed.state() for name, feed in trainer.feeds.items()})
    for name in {store for stage in trainer.stages if not stage.offline for store in stage.writes}:
        ids = trainer.stores[name].ids()
        found[f"store.{name}"] = {"ids": ids, **trainer.stores[name].read(ids)}
    return {name: whole(tensors) for name, tensors in found.items()}


def state(trainer: Trainer) -> dict[str, Any]:
    """The JSON part."""
    return {
        "format": FORMAT,
        "noise": NOISE,
        "stage": trainer.stages[trainer.place.stage].name,
        "processes": distributed.world(),
        "place": asdict(trainer.place),
        "recipe": trainer.recipe.plain(),
        "best": trainer.best.state(),
        "guards": trainer.guards.first,
        "ema_decay": {name: handle.ema_decay for name, handle in trainer.handles.items()},
    }


def place(saved: Checkpoint) -> Place:
    """The place a checkpoint was written at."""
    return Place(**saved.state["place"])


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Puts a trainer, whose stage has been set up, into the state of `saved`."""
    restore_roles(trainer.handles, saved)
    for name, optimizer in trainer.optimizers.items():
        optimizer.load_state(saved.files[f"{name}.optimizer"])
    for name, feed in trainer.feeds.items():
        feed.load_state(saved.files[f"feed.{name}"])
    trainer.method.load_state(saved.files["method"])
    for file, rows in saved.files.items():
        if file.startswith("store."):
            columns = dict(rows)
            trainer.stores[file.removeprefix("store.")].write(columns.pop("ids"), **columns)
    trainer.place = place(saved)
    trainer.best.load_state(saved.state["best"])
    trainer.guards.first = dict(saved.state["guards"])
    decays = saved.state.get("ema_decay", {})  # checkpoints from before warm-ups have none
    for name, handle in trainer.handles.items():
        handle.ema_decay = decays.get(name, handle.ema_decay)


def restore_roles(handles: Mapping[str, Handle], saved: Checkpoint) -> None:
    """Loads every trained role and its EMA from a checkpoint."""
    for name, handle in handles.items():
        if f"{name}.role" in saved.files:
            handle.load_state(saved.files[f"{name}.role"])
        if handle.ema is not None and f"{name}.ema" in saved.files:
            for key, tensor in saved.files[f"{name}.ema"].items():
                handle.ema[key].copy_(part_of(tensor, handle.ema[key]))
