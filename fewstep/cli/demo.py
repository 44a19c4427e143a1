"""`fewstep demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import STDOUT, answer, only_json
from .arguments import Json

Out = Annotated[Path, typer.Option("--out", help="Folder of the run; it must be empty or new.")]
Full = Annotated[bool, typer.Option("--full", help="Tune full copies, in place of two adapters on one base.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no table.")]


def demo(out: Out = Path("runs/demo"), full: Full = False, quiet: Quiet = False, json: Json = None) -> None:
    """Train a teacher on real images, distil it, compare both."""
    from ..engine.demo import demo as run

    with only_json(json):
        file = None if json == STDOUT else json
        found = run(out, file, tune="full" if full else None, show=not quiet)
    if json == STDOUT:  # the table and the file are the demo's own
        answer(found, STDOUT, lambda: None)
