"""The rows of `fewstep methods`, read off the classes themselves."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Method
from .registry import METHODS


@dataclass(frozen=True)
class Described:
    """name, kind, paper, roles and what is proven (measured | unit | reconstruction) of one method."""

    name: str
    kind: str
    paper: str
    roles: tuple[str, ...]
    proven: str


def describe(cls: type[Method], name: str) -> Described:
    """One row; `roles` are those of the default config."""
    paper = f"{cls.paper.title} ({cls.paper.id})" if cls.paper else ""
    return Described(name, cls.kind, paper, tuple(role.name for role in cls().roles()), cls.proven)


def list_methods() -> list[Described]:
    """All methods, own and third-party."""
    return [describe(METHODS.get(name), name) for name in METHODS.names()]
