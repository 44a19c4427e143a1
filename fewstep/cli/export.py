"""`fewstep export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import answer, only_json, say
from .arguments import Json, Run
from .sample import hint

To = Annotated[Path, typer.Option("--to", help="Folder to write; it must be empty or new.")]
At = Annotated[
    int | None, typer.Option("--checkpoint", metavar="N", help="Step of the checkpoint; default: the newest.")
]


def export(run: Run, to: To, checkpoint: At = None, json: Json = None) -> None:
    """Write a checkpoint's student as a model folder."""
    from ..engine.exporting import export as write

    with only_json(json):
        folder = write(run, to, checkpoint)
    answer({"model": str(folder)}, json, lambda: say(model=folder, sample=hint(folder)))
