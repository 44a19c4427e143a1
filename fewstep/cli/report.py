"""`fewstep report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import answer, only_json, say
from .arguments import Json, Run

Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="HTML file to write; default: RUN/report.html.")
]


def report(run: Run, out: Out = None, json: Json = None) -> None:
    """Write a run's report, one HTML file that needs no network."""
    from ..engine.report import report as write

    with only_json(json):
        file = write(run, out)
    answer({"report": str(file)}, json, lambda: say(report=file))
