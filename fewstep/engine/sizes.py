"""How long a stage is and how its batch is cut: the same numbers for the trainer and for `fewstep plan`."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..methods.base import Method, Stage
from ..recipe import Recipe


@dataclass(frozen=True)
class Sizes:
    """steps: optimiser steps. batch: rows of one step, over all processes. lr: factor on every learning rate."""

    steps: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Cut:
    """batch = micro x parts x processes: `micro` rows a forward pass, `parts` passes a process and step."""

    micro: int
    parts: int


def sizes(stage: Stage, recipe: Recipe) -> Sizes:
    """What the recipe's `stages:` says of this stage, else the method, else `train:`."""
    patch, train = recipe.stages.get(stage.name), recipe.train
    return Sizes(
        steps=(patch.steps if patch else None) or stage.steps or train.steps,
        batch=(patch.batch if patch else None) or stage.batch or train.batch,
        lr=patch.lr if patch and patch.lr else stage.lr,
    )


def cut(batch: int, recipe: Recipe, method: Method, world: int = 1) -> Cut:
    """Micro-batches of a batch on `world` processes; UserError when rows or processes do not divide it."""
    if batch % world:
        raise UserError(f"train.batch={batch} does not divide over {world} processes: choose a multiple of {world}")
    rows = batch // world
    micro = min(recipe.train.micro_batch or rows, rows)
    if rows % micro or micro % method.row_multiple:
        multiple = f" with rows in multiples of {method.row_multiple}" if method.row_multiple > 1 else ""
        raise UserError(
            f"train.batch={batch} cannot be cut into micro-batches of {micro} on {world} processes{multiple}"
        )
    if micro < rows and method.batch_losses:
        raise UserError(f"'{recipe.method}' has losses over the whole batch: remove train.micro_batch")
    return Cut(micro, rows // micro)
