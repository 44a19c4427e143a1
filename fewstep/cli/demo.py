"""`fewstep demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import STDOUT, answer, only_json
from .arguments import Json

Out = Annotated[Path, typer.Option("--out", help="Folder of the run.")]


def demo(out: Out = Path("runs/demo"), json: Json = None) -> None:
    """Train a small teacher on real images, distil it, and compare both."""
    from ..engine.demo import demo as run

    with only_json(json):
        found = run(out, json=None if json == STDOUT else json)
    answer(found, json if json == STDOUT else None, lambda: None)  # the demo itself prints its table and writes its file
