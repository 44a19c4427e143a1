"""Tables from a name to a class or function. An entry is imported when it is asked for, never before.

Third parties add entries through entry points of the table's group, e.g. in their `pyproject.toml`:

    [project.entry-points."fewstep.methods"]
    my_method = "my_package.my_module:MyMethod"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import UserError, nearest


class Registry:
    """`kind` is the word used in errors ("method"); `group` the entry-point group; `table` maps name -> "module:attribute"."""

    def __init__(self, kind: str, group: str, table: Mapping[str, str]):
        self.kind, self.group, self.table = kind, group, dict(table)

    def _foreign(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """All names, own first, then those of installed third parties."""
        return [*self.table, *(name for name in self._foreign() if name not in self.table)]

    def __contains__(self, name: str) -> bool:
        return name in self.table or name in self._foreign()

    def get(self, name: str) -> Any:
        """The class or function called `name`; UserError with the nearest name when there is none."""
        if name in self.table:
            module, attribute = self.table[name].split(":")
            return getattr(import_module(module), attribute)
        foreign = self._foreign()
        if name in foreign:
            return foreign[name].load()
        raise UserError(f"unknown {self.kind} '{name}': {nearest(name, self.names())}")
