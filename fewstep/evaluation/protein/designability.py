"""Designability: whether some sequence folds into a backbone, asked of models that are handed in.

    design(x, k, temperature) -> k sequences       x [n, 3] CA atoms in Angstrom; ProteinMPNN's CA-only weights
    fold(sequence) -> [n, 3]                       CA atoms in Angstrom; ESMFold, see `esmfold.esmfold`

A backbone is designable when the best of k = 8 sequences, drawn at temperature 0.1, is folded to within 2 Angstrom of it.

No weights of either come with fewstep. A design function from a local ProteinMPNN (github.com/dauparas/ProteinMPNN,
`protein_mpnn_run.py --ca_only --num_seq_per_target k --sampling_temp t` on a PDB file of x) is a few lines: write x with
`files.write_chain`, run it, read the k sequences of its FASTA file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from .geometry import Coords
from .similarity import rmsd

Design = Callable[[Coords, int, float], Sequence[str]]
Fold = Callable[[str], Coords]


@dataclass(frozen=True)
class Designed:
    """The best sequence of a backbone and its RMSD in Angstrom."""

    rmsd: float
    sequence: str


@dataclass(frozen=True)
class Designability:
    """share: of designable backbones. best: each backbone's best sequence."""

    share: float
    best: tuple[Designed, ...]


def designability(
    chains: Sequence[Coords],
    design: Design,
    fold: Fold,
    sequences: int = 8,
    temperature: float = 0.1,
    within: float = 2.0,
) -> Designability:
    """Share of `chains` [residues, 3] in Angstrom of which a designed sequence folds back to less than `within` Angstrom.

    Backbones with coordinates that are not numbers are not designable. UserError when the two functions answer with
    another number of sequences or of residues than asked.
    """
    best = tuple(self_consistency(np.asarray(x, float), design, fold, sequences, temperature) for x in chains)
    return Designability(float(np.mean([d.rmsd < within for d in best])) if best else float("nan"), best)


def self_consistency(x: Coords, design: Design, fold: Fold, sequences: int = 8, temperature: float = 0.1) -> Designed:
    """The sequence of `sequences` designed ones that folds nearest to x; RMSD infinite where x is not finite."""
    if not np.isfinite(x).all():
        return Designed(float("inf"), "")
    found = list(design(x, sequences, temperature))
    if len(found) != sequences:
        raise UserError(
            f"the design function gave {len(found)} sequences, not {sequences}: let it draw as many as asked"
        )
    return min((Designed(_distance(x, fold(sequence)), sequence) for sequence in found), key=lambda d: d.rmsd)


def _distance(x: Coords, folded: Coords) -> float:
    folded = np.asarray(folded, float)
    if folded.shape != x.shape:
        raise UserError(
            f"the fold function gave coordinates {folded.shape} for a chain {x.shape}: give its CA atoms, one a residue"
        )
    return rmsd(x, folded)
