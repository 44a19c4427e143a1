"""`fewstep train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import answer, only_json, say
from .arguments import Json, Overrides, Recipe
from .sample import hint

Out = Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/<the recipe's folder>-<its name>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
StageName = Annotated[str | None, typer.Option("--stage", metavar="NAME", help="Run this stage only.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    stage: StageName = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Train a recipe and export its student."""
    from ..engine.trainer import train as run

    with only_json(json):
        done = run(recipe, out or default_out(recipe), overrides or (), resume, stage, show=not quiet)
    found = {"folder": str(done.folder), "model": str(done.model) if done.model else None, "steps": done.steps}
    hints = {"sample": hint(done.model), "score": f"fewstep evaluate {done.model}"} if done.model else {}
    answer(
        found,
        json,
        lambda: say(run=done.folder, steps=done.steps, model=done.model, **hints),
    )


def default_out(recipe: Path) -> Path:
    """configs/decoupled_dmd/digits.yaml -> runs/decoupled_dmd-digits"""
    whole = recipe.resolve()
    return Path("runs") / f"{whole.parent.name}-{whole.stem}"
