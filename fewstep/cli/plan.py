"""`fewstep plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .answers import answer, megabytes, number, only_json, say, table
from .arguments import Json, Overrides, Recipe

if TYPE_CHECKING:
    from ..engine.plan import Plan, RolePlan, StagePlan

ROLES = ("role", "from", "tune", "parameters", "trained", "weights", "gradients", "optimiser", "EMA", "activations")
GB = 1e9
CARDS = (16, 24, 48, 80)  # GB of the usual devices
STAGES = ("stage", "trains", "data", "steps", "batch", "micro-batch", "parts")


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    json: Json = None,
    memory: Annotated[float | None, typer.Option(help="GB of a device; fails when the recipe needs more.")] = None,
) -> None:
    """Show what a recipe would hold in memory and run; trains nothing."""
    from ..engine.plan import plan as made

    with only_json(json):
        found = made(recipe, overrides or ())
    answer({**asdict(found), "ratio": found.ratio}, json, lambda: _show(found))
    if memory is not None:
        _refuse(found, memory)


def _refuse(found: Plan, memory: float) -> None:
    if found.total_bytes is None:
        raise UserError(f"whether the recipe fits in {memory:g} GB is not known: {found.unknown}")
    if found.total_bytes > memory * GB:
        raise UserError(
            f"the recipe needs {found.total_bytes / GB:.1f} GB of {memory:g}: set ROLE.gradient_checkpointing=true, "
            "train.precision=bf16, a smaller train.micro_batch, or tune roles by lora"
        )


def _show(found: Plan) -> None:
    names = [r.name for r in found.roles]
    table(ROLES, [*(_role(r, names) for r in found.roles), _sum(found)], title=f"{found.method}: roles", left=3)
    table(STAGES, map(_stage, found.stages), title="stages", left=3)
    said = {
        "peak": f"{megabytes(found.peak_bytes)} without activations",
        "with_full_copies": f"{megabytes(found.copies_bytes)} ({found.ratio:.2f} times as much)",
    }
    say(**said, **_fits(found))


def _fits(found: Plan) -> dict[str, str]:
    if found.total_bytes is None:
        return {"activations": f"not known: {found.unknown}"}
    needed = found.total_bytes / GB
    fits = ", ".join(f"{size} GB {'yes' if needed <= size else 'no'}" for size in CARDS)
    return {"with_activations": megabytes(found.total_bytes), "fits": fits}


def _role(r: RolePlan, roles: Sequence[str]) -> tuple[object, ...]:
    origin = f"{r.shares} (shared)" if r.shares else f"{r.source} (copy)" if r.source in roles else r.source
    counts = (number(r.parameters), number(r.trained))
    held = map(megabytes, (r.weights, r.gradients, r.optimizer, r.ema))
    return (r.name, origin, r.tune, *counts, *held, "" if r.activations is None else megabytes(r.activations))


def _sum(found: Plan) -> tuple[object, ...]:
    columns = zip(*((r.weights, r.gradients, r.optimizer, r.ema) for r in found.roles))
    return ("sum", "", "", "", "", *(megabytes(sum(column)) for column in columns), "")


def _stage(s: StagePlan) -> tuple[object, ...]:
    return (
        s.name,
        ", ".join(s.trains) or "offline",
        ", ".join(s.data),
        number(s.steps),
        s.batch,
        s.micro_batch,
        s.parts,
    )
