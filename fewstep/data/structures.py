"""Protein chains from PDB and mmCIF files: their CA atoms, and where a chain is broken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif", ".bcif")
LONGEST_BOND = 4.2  # Angstrom between consecutive CA; beyond, residues are missing


@dataclass(frozen=True)
class Chain:
    """CA atoms of one protein chain. x [residues, 3] in Angstrom; `name` is FILE_CHAIN."""

    name: str
    x: NDArray[np.float32]

    @property
    def breaks(self) -> NDArray[np.int64]:
        """Residues i after which some are missing: CA i and i + 1 are more than 4.2 Angstrom apart."""
        return np.flatnonzero(np.linalg.norm(np.diff(self.x, axis=0), axis=1) > LONGEST_BOND)

    def pieces(self) -> Iterator[Chain]:
        """The unbroken parts of the chain, itself when it is whole."""
        parts = np.split(self.x, self.breaks + 1)
        for i, part in enumerate(parts):
            yield Chain(self.name if len(parts) == 1 else f"{self.name}.{i}", part)


def list_structures(folder: Path) -> list[Path]:
    """Structure files in a folder and below, by name. UserError when there are none."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"'{folder}' has no structure files ({', '.join(SUFFIXES)})")
    return files


def read_chains(file: Path) -> list[Chain]:
    """Protein chains of the first model in a file, in its order; of alternative locations the first, and of chains with
    the very same coordinates as well.

    Raises UserError for a file that is no structure, holds no protein, or has coordinates that are not numbers.
    """
    atoms = _atoms(file)
    structure: Any = import_module("biotite.structure")
    found = atoms[structure.filter_amino_acids(atoms) & (atoms.atom_name == "CA")]
    if len(found) == 0:
        raise UserError(f"'{file}' holds no protein: no amino acid in it has a CA atom")
    if not np.isfinite(found.coord).all():
        raise UserError(f"'{file}' has CA coordinates that are not numbers: repair it or leave it out")
    names = list(dict.fromkeys(found.chain_id.tolist()))
    different: dict[bytes, Chain] = {}
    for name in names:
        x = np.asarray(found.coord[found.chain_id == name])
        different.setdefault(x.tobytes(), Chain(f"{file.stem}_{name}", x))
    return list(different.values())


def _atoms(file: Path) -> Any:
    try:
        pdb, pdbx = import_module("biotite.structure.io.pdb"), import_module("biotite.structure.io.pdbx")
    except ImportError as error:
        raise UserError("structures need biotite, which is not installed: pip install 'fewstep[protein]'") from error
    suffix = file.suffix.lower()
    try:
        if suffix == ".bcif":
            return pdbx.get_structure(pdbx.BinaryCIFFile.read(str(file)), model=1)
        if suffix in (".cif", ".mmcif"):
            return pdbx.get_structure(pdbx.CIFFile.read(str(file)), model=1)
        return pdb.PDBFile.read(str(file)).get_structure(model=1)
    except Exception as error:  # biotite raises what its parsers happen on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"'{file}' is no readable structure file: {reason}") from error
