"""One line of a doctor's report, and what a check looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """How bad it is, what was found, and what to do about it (empty when nothing)."""

    level: Literal["ok", "warn", "error"]
    what: str
    mend: str = ""


@dataclass(frozen=True)
class Subject:
    """A model folder and what its fewstep.json says (empty when it has none)."""

    folder: Path
    said: Mapping[str, Any]


Findings = Iterator[Finding]
Check = Callable[[Subject], Findings]
