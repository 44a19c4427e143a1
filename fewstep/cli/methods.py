"""`fewstep methods`."""

from __future__ import annotations

from dataclasses import asdict

from .answers import answer, only_json, table
from .arguments import Json


def methods(json: Json = None) -> None:
    """List the methods, their papers, and what is proven of each."""
    from ..methods.listing import list_methods

    with only_json(json):
        found = list_methods()
    rows = [(m.name, m.kind, m.proven, ", ".join(m.roles), m.paper) for m in found]
    answer(
        [asdict(m) for m in found], json, lambda: table(("method", "kind", "proven", "roles", "paper"), rows, left=5)
    )
