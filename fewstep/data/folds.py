"""Fold labels of protein chains: CATH codes, and tables that give them.

A code is class.architecture.topology, e.g. 3.40.50; less of it ("3.40", "3") is known less finely, and what follows (the
superfamily) is not read. A network is told three numbers, one a level, counted from 1 in the order of the codes; 0 = not known.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

LEVELS = 3
_CODE = re.compile(r"\d+(\.\d+){0,3}")


class Folds:
    """The numbers of the codes that a network knows. `codes`: sorted topologies and what is known less finely."""

    def __init__(self, codes: Iterable[str]):
        self.codes = tuple(sorted({_cut(code, LEVELS) for code in codes if code}, key=_order))
        self._numbers: Sequence[Mapping[str, int]] = [
            {code: i + 1 for i, code in enumerate(self._known(depth))} for depth in range(1, LEVELS + 1)
        ]

    def _known(self, depth: int) -> list[str]:
        deep = {_cut(code, depth) for code in self.codes if code.count(".") >= depth - 1}
        return sorted(deep, key=_order)

    @property
    def classes(self) -> tuple[int, ...]:
        """Numbers of labels at the levels C, A, T: the network's `cath_classes`."""
        return tuple(map(len, self._numbers))

    def label(self, code: str) -> tuple[int, ...]:
        """(C, A, T) of a code, "" for not known. UserError for a code that is none, or not among `codes`."""
        if not code:
            return (0,) * LEVELS
        _check(code)
        parts = code.split(".")[:LEVELS]
        told = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        if any(part not in numbers for part, numbers in zip(told, self._numbers)):
            raise UserError(f"fold {code} is not among the {len(self.codes)} that are known here")
        known = [numbers[part] for part, numbers in zip(told, self._numbers)]
        return (*known, *(0,) * (LEVELS - len(known)))

    def labels(self, codes: Sequence[str]) -> Tensor:
        """[n, 3], int64."""
        return torch.tensor([self.label(code) for code in codes], dtype=torch.int64).reshape(-1, LEVELS)


def read_table(file: str, first: str) -> list[tuple[str, str]]:
    """Rows (value of the column `first`, code) of a CSV file with the columns `first` and `cath`.

    UserError for a file that is not there, other columns, no rows, and codes that are none, with their line.
    """
    try:
        with Path(file).open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            if not {first, "cath"} <= set(reader.fieldnames or ()):
                raise UserError(f"'{file}' has the columns {', '.join(reader.fieldnames or ())}: write {first},cath")
            rows = [(str(row[first]), str(row["cath"] or "")) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read '{file}': {error}") from None
    if not rows:
        raise UserError(f"'{file}' has no rows below its head")
    for number, (_, code) in enumerate(rows, start=2):
        if code and not _CODE.fullmatch(code):
            raise UserError(f"line {number} of '{file}': '{code}' is no CATH code such as 3.40.50")
    return rows


def known_folds(file: str | None, codes: Iterable[str]) -> Folds:
    """Those of a text file with one code a line, or without one those of `codes`.

    Teacher and student must count alike: give both the same file, where their tables hold different codes.
    """
    if file is None:
        return Folds(codes)
    try:
        lines = Path(file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{file}': {error}") from None
    for code in lines:
        _check(code)
    return Folds(lines)


def check_folds(sources: Mapping[str, Any], module: Any) -> None:
    """UserError when a source tells folds that a network does not count alike."""
    for name, source in sources.items():
        folds = getattr(source, "folds", None)
        knows = tuple(module.config["cath_classes"])
        if folds is not None and folds.classes != knows:
            said = ", ".join(map(str, folds.classes))
            raise UserError(
                f"data.{name} has ({said}) fold classes and the network ({', '.join(map(str, knows))}): "
                f"write cath_classes: [{said}] into its `build`, or the teacher's `folds` into the data"
            )


def _check(code: str) -> None:
    if not _CODE.fullmatch(code):
        raise UserError(f"'{code}' is no CATH code such as 3.40.50")


def _cut(code: str, depth: int) -> str:
    return ".".join(code.split(".")[:depth])


def _order(code: str) -> list[int]:
    return [int(part) for part in code.split(".")]
