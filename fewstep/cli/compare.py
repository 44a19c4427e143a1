"""`fewstep compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .answers import answer, number, say, table
from .arguments import Json

Folder = Annotated[Path, typer.Argument(metavar="A", help="A folder that `evaluate --out` wrote.")]
Other = Annotated[Path, typer.Argument(metavar="B", help="Another, under the same protocol.")]


def compare(a: Folder, b: Other, json: Json = None) -> None:
    """Compare two evaluations prompt by prompt: differences B - A with intervals, and a sign test."""
    from ..evaluation.compare import compare_runs

    found = compare_runs(a, b)
    answer(found, json, lambda: _show(found))


def _show(found: dict[str, Any]) -> None:
    columns = ("score", "A", "B", "B - A", "95 % interval", "B above, below, equal", "p (sign test)")
    table(columns, [_row(row) for row in found["rows"]])
    say(A=found["a"], B=found["b"], n=found["n"])


def _row(row: dict[str, Any]) -> list[str]:
    shown = [row["label"], *(number(row[key], 4) for key in ("a", "b", "difference"))]
    if "p" not in row:
        return [*shown, "", "", ""]
    counts = ", ".join(str(row[key]) for key in ("wins", "losses", "ties"))
    return [*shown, f"{number(row['low'], 4)} .. {number(row['high'], 4)}", counts, number(row["p"])]
