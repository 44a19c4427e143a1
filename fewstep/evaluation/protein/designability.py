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
from importlib import import_module
from typing import Any

import numpy as np

from ...errors import UserError
from .geometry import Coords
from .similarity import rmsd

Design = Callable[[Coords, int, float], Sequence[str]]
Fold = Callable[[str], Coords]
SEQUENCES, TEMPERATURE, WITHIN = 8, 0.1, 2.0


@dataclass(frozen=True)
class Judges:
    """Who designs sequences and who folds them; `name` tells both, for the protocol of the score."""

    design: Design
    fold: Fold
    name: str

    @classmethod
    def named(cls, design: str, fold: str) -> Judges:
        """design: "module:function" of an importable module. fold: that, or a local folder of ESMFold.

        UserError for a module or function that is not there, and for a folder that is none of ESMFold.
        """
        from .esmfold import esmfold

        folding = _function(fold, "--fold") if ":" in fold else esmfold(fold)
        return cls(_function(design, "--design"), folding, f"{design} + {fold}")


def _function(place: str, option: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option}={place}: write module:function of one that can be imported ({error})") from None


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
    sequences: int = SEQUENCES,
    temperature: float = TEMPERATURE,
    within: float = WITHIN,
) -> Designability:
    """Share of `chains` [residues, 3] in Angstrom of which a designed sequence folds back to less than `within` Angstrom.

    Backbones with coordinates that are not numbers are not designable. UserError when the two functions answer with
    another number of sequences or of residues than asked.
    """
    best = tuple(self_consistency(np.asarray(x, float), design, fold, sequences, temperature) for x in chains)
    return Designability(float(np.mean([d.rmsd < within for d in best])) if best else float("nan"), best)


def self_consistency(
    x: Coords, design: Design, fold: Fold, sequences: int = SEQUENCES, temperature: float = TEMPERATURE
) -> Designed:
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
