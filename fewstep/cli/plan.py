"""`fewstep plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .answers import answer, megabytes, number, only_json, say, table
from .arguments import Json, Overrides, Recipe

if TYPE_CHECKING:
    from ..engine.plan import Plan, RolePlan, StagePlan

ROLES = ("role", "from", "tune", "parameters", "trained", "weights", "gradients", "optimiser", "EMA")
STAGES = ("stage", "trains", "data", "steps", "batch", "micro-batch", "parts")


def plan(recipe: Recipe, overrides: Overrides = None, json: Json = None) -> None:
    """Show what a recipe would hold in memory and run; trains nothing."""
    from ..engine.plan import plan as made

    with only_json(json):
        found = made(recipe, overrides or ())
    answer({**asdict(found), "ratio": found.ratio}, json, lambda: _show(found))


def _show(found: Plan) -> None:
    names = [r.name for r in found.roles]
    table(ROLES, [*(_role(r, names) for r in found.roles), _sum(found)], title=f"{found.method}: roles", left=3)
    table(STAGES, map(_stage, found.stages), title="stages", left=3)
    say(
        peak=f"{megabytes(found.peak_bytes)} without activations",
        with_full_copies=f"{megabytes(found.copies_bytes)} ({found.ratio:.2f} times as much)",
    )


def _role(r: RolePlan, roles: Sequence[str]) -> tuple[object, ...]:
    origin = f"{r.shares} (shared)" if r.shares else f"{r.source} (copy)" if r.source in roles else r.source
    counts = (number(r.parameters), number(r.trained))
    return (r.name, origin, r.tune, *counts, *map(megabytes, (r.weights, r.gradients, r.optimizer, r.ema)))


def _sum(found: Plan) -> tuple[object, ...]:
    columns = zip(*((r.weights, r.gradients, r.optimizer, r.ema) for r in found.roles))
    return ("sum", "", "", "", "", *(megabytes(sum(column)) for column in columns))


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
