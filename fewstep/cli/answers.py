"""How commands answer: tables and lines for people, or JSON for scripts, on stdout; everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import UserError

STDOUT = "-"


def process() -> int:
    """Number of this process among those that a launcher started; 0 is the one that answers."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def only_json(to: str | None) -> Iterator[None]:
    """While a command works, what libraries print goes to stderr if stdout is promised to JSON."""
    if to != STDOUT:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def answer(found: Any, to: str | None, show: Callable[[], None]) -> None:
    """Shows the answer, unless stdout is promised to JSON, and writes `found` as JSON where asked."""
    if process() != 0:
        return
    if to != STDOUT:
        show()
    if to is not None:
        _write(json.dumps(_finite(found), indent=1, default=str) + "\n", to)


def _write(text: str, to: str) -> None:
    if to == STDOUT:
        print(text, end="")
        return
    try:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).write_text(text)
    except OSError as error:
        raise UserError(f"cannot write --json {to}: {error.strerror}") from None


def _finite(found: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, dict):
        return {str(key): _finite(value) for key, value in found.items()}
    return [_finite(value) for value in found] if isinstance(found, list | tuple) else found


def say(**facts: object) -> None:
    """Prints `name  value` lines, aligned; None is left out."""
    shown = {name.replace("_", " "): value for name, value in facts.items() if value is not None}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        print(f"{name:<{width}}  {value}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, left: int = 1) -> None:
    """Prints a table; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))  # plain text: rich would read [digits-cnn] as markup
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table: 12,345 for whole ones, 3 significant digits else, a dash for none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def megabytes(count: int) -> str:
    """Bytes in MiB or GiB; a dash for none."""
    if not count:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
