"""Whether a checkpoint belongs to a recipe: habits may change between runs, what is trained may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipe import Recipe
from .checkpoint import Checkpoint, newest

# Rows are addressed by their slot in the global batch, so the cut into micro-batches and processes may change as well.
FREE = {
    "train.save_every",
    "train.keep_last",
    "train.log_every",
    "train.trackers",
    "train.micro_batch",
    "train.check_export",
    "validate",
    "preview",
    "guards",
    "stores",
    "evaluation",
}


def to_resume(recipe: Recipe, folder: Path, resume: bool) -> Checkpoint | None:
    """The newest checkpoint of the run in `folder`, None for a new run. UserError when a run is there and `resume` is False."""
    found = newest(folder / "checkpoints")
    if found is None:
        return None
    if not resume:
        raise UserError(f"'{folder}' already holds a run: add --resume to go on with it, or choose another --out")
    check_same_recipe(recipe, found)
    return found


def check_same_recipe(recipe: Recipe, saved: Checkpoint) -> None:
    """UserError naming the first field that differs from the run's own recipe."""
    now, then = dict(_flat(recipe.plain())), dict(_flat(saved.state["recipe"]))
    for key in sorted(now.keys() | then.keys()):
        if _may_change(key, then.get(key), now.get(key)):
            continue
        raise UserError(
            f"cannot resume: {key} was {then.get(key)!r} and is {now.get(key)!r}. "
            f"Resume with {saved.folder.parent.parent / 'recipe.yaml'}, or start a new --out"
        )


def _may_change(key: str, then: Any, now: Any) -> bool:
    """Equal, a habit, or more steps: a longer run, whose learning rates follow the new length from here on."""
    if then == now or any(key == free or key.startswith(free + ".") for free in FREE):
        return True
    if key.startswith("data.") and key.endswith((".cache", ".index")):
        return True  # where what was made of the data lies
    return key == "train.steps" and then is not None and now is not None and now > then


def _flat(said: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
