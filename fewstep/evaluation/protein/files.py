"""The chains that are scored: made by an exported model, or read from a folder; and structure files of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ...data.chains import read_folder, shipped
from ...data.source import digest
from ...data.structures import SUFFIXES, list_structures, read_chains
from ...errors import UserError
from ...exporting.index import read_index
from ..samples import is_pipeline
from .geometry import Coords
from .scores import Described, described
from .secondary_structure import backbone

PIPELINE = "FewStepProteinPipeline"
STRUCTURES = "structures"  # folder of a run's own files
SHIPPED = "chains"  # name of the real chains in assets
Maker = Callable[..., Any]  # as `exporting.chains.generate_chains`


@dataclass(frozen=True)
class Made:
    """Chains [residues, 3] in Angstrom and their names.

    facts: how a model made them (`nfe`, `ms_per_chain`, `steps`, `timesteps`, `scheduler`, `noise_scale`); empty for
    chains from elsewhere.
    """

    chains: Sequence[Coords]
    names: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> str:
        """`100`, or `50-150`."""
        sizes = sorted({len(x) for x in self.chains})
        return f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else str(*sizes)


@dataclass(frozen=True)
class Reference:
    """Chains to compare with, and the words that name them in a protocol."""

    chains: Sequence[Described]
    name: str


def holds_chains(folder: Path) -> bool:
    """Whether `folder` is a protein model, or holds structure files. UserError when there is no such folder."""
    if is_pipeline(folder):
        named = read_index(folder).get("_class_name") if (folder / "model_index.json").exists() else None
        return (named[-1] if isinstance(named, list) else named) == PIPELINE
    return any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*"))


def make(model: Any, n: int, lengths: Sequence[int], maker: Maker | None = None, **options: Any) -> Made:
    """n chains of a model folder; chain i is a function of (seed, i) and has length i of `lengths`, round and round.

    maker: in place of `exporting.chains.generate_chains`. options: seed, steps, noise_scale, batch (None: the model's own).
    """
    made = (maker or _generate)(model, n, lengths=tuple(lengths), **options)
    timesteps = [float(t) for t in made.timesteps]
    facts = {
        "nfe": made.nfe,
        "ms_per_chain": made.ms_per_chain,
        "steps": len(timesteps),
        "timesteps": timesteps,
        "scheduler": made.scheduler,
        "noise_scale": made.noise_scale,
    }
    return Made([np.asarray(x, float) for x in made.chains], [f"{i:06d}" for i in range(n)], facts)


def _generate(*args: Any, **options: Any) -> Any:
    from ...exporting.chains import generate_chains  # late: diffusers is needed by models alone

    return generate_chains(*args, **options)


def read(folder: Path, n: int | None = None) -> Made:
    """The first n protein chains (None: all) in the structure files of `folder`, or of `folder/structures`.

    A chain is taken whole: where residues are missing it has a bond that is too long, which its scores tell.
    """
    root = folder / STRUCTURES if (folder / STRUCTURES).is_dir() else folder
    found = [chain for file in list_structures(root) for chain in read_chains(file)]
    if n is not None and n > len(found):
        raise UserError(f"'{root}' has {len(found)} chains, not {n}: lower n")
    found = found[:n]
    return Made([c.x.astype(float) for c in found], [c.name for c in found])


def load_reference(said: str | Path | None) -> Reference | None:
    """Unbroken chains of a folder of structure files, or with "chains" the shipped real ones; None stays None."""
    if said is None:
        return None
    folder = Path(said)
    if not folder.is_dir() and str(said) != SHIPPED:
        raise UserError(f"no reference '{said}': give a folder of structure files, or {SHIPPED} for the shipped ones")
    found = read_folder(folder) if folder.is_dir() else shipped()
    sha = digest(*(c.x.tobytes() for c in found))[:16]
    return Reference([described(c.x.astype(float)) for c in found], f"{folder.name} n={len(found)} sha256={sha}")


def write_chain(x: Coords, file: Path) -> Path:
    """One chain of CA atoms [residues, 3] in Angstrom as PDB, residues named ALA."""
    pdb: Any = import_module("biotite.structure.io.pdb")
    written = pdb.PDBFile()
    written.set_structure(backbone(x))
    file.parent.mkdir(parents=True, exist_ok=True)
    written.write(str(file))
    return file
