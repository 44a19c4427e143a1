"""`fewstep doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .answers import answer, only_json, table
from .arguments import Json, Model


def doctor(model: Model, json: Json = None) -> None:
    """Check a model folder; exit code 1 when it holds an error."""
    from ..exporting.doctor import doctor as examine

    with only_json(json):
        found = examine(model)
    rows = [(f.level, f.what, f.mend) for f in found]
    answer([asdict(f) for f in found], json, lambda: table(("level", "finding", "mend"), rows, left=3))
    if any(f.level == "error" for f in found):
        raise typer.Exit(1)
