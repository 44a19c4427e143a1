"""Secondary structure from CA atoms alone: the P-SEA algorithm (Labesse et al., CABIOS 1997), as biotite implements it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from ...errors import UserError
from .geometry import Coords

WIDEST_BOND = 5.0  # Angstrom a residue


def secondary_structure(x: Coords) -> str:
    """A letter a residue for a chain [residues, 3] in Angstrom: h helix, s strand, c neither.

    All are c where the chain reaches wider than bonds allow: a diverged model's samples, of which biotite's grid of cells
    would fill the memory.
    """
    if len(x) and np.ptp(x, axis=0).max() > WIDEST_BOND * len(x):
        return "c" * len(x)
    with np.errstate(divide="ignore", invalid="ignore"):  # atoms of one place have no angle between them
        letters = _structure().annotate_sse(backbone(x))
    return "".join({"a": "h", "b": "s"}.get(letter, "c") for letter in letters)


def shares(letters: str) -> tuple[float, float]:
    """Shares of helix and of strand."""
    return letters.count("h") / len(letters), letters.count("s") / len(letters)


def backbone(x: Coords, chain: str = "A", residue: str = "ALA") -> Any:
    """A biotite AtomArray of CA atoms at x [residues, 3] in Angstrom, numbered from 1."""
    atoms = _structure().AtomArray(len(x))
    atoms.coord = np.asarray(x, np.float32)
    atoms.res_id = np.arange(1, len(x) + 1)
    for field, value in {"chain_id": chain, "res_name": residue, "atom_name": "CA", "element": "C"}.items():
        atoms.set_annotation(field, np.full(len(x), value))
    return atoms


def _structure() -> Any:
    try:
        return import_module("biotite.structure")
    except ImportError as error:
        raise UserError("structures need biotite, which is not installed: pip install 'fewstep[protein]'") from error
