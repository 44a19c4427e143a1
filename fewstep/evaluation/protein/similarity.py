"""How alike chains are: TM-scores, clusters of a set, distance to a reference (Zhang & Skolnick, Proteins 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import combinations

import numpy as np

from ...errors import UserError
from .geometry import Coords

SAME_FOLD = 0.5


def tm_score(a: Coords, b: Coords) -> float:
    """TM-score of two chains in Angstrom, 1 for equal ones, over .5 for one fold; the larger of both normalisations.

    Aligned by TM-align where tmtools is installed; without it chains of one length are laid over each other residue by
    residue (`superposed_tm`), and others raise UserError.
    """
    try:
        align = import_module("tmtools").tm_align
    except ImportError as error:
        if len(a) == len(b):
            return superposed_tm(a, b)
        raise UserError(
            "TM-scores of chains of different lengths need tmtools, which is not installed: pip install tmtools"
        ) from error
    found = align(np.asarray(a, float), np.asarray(b, float), "A" * len(a), "A" * len(b))
    return float(max(found.tm_norm_chain1, found.tm_norm_chain2))


def superposed_tm(a: Coords, b: Coords) -> float:
    """TM-score of two chains of one length after the rotation of least squares (Kabsch), mirrors not allowed.

    mean 1 / (1 + (d_i / d0)^2), d0 = max(.5, 1.24 (n - 15)^(1/3) - 1.8). Never above that of TM-align.
    """
    n = len(a)
    d0 = max(0.5, 1.24 * (n - 15) ** (1 / 3) - 1.8) if n > 15 else 0.5
    moved = superposed(b, a)
    return float((1 / (1 + ((moved - a) ** 2).sum(1) / d0**2)).mean())


def superposed(x: Coords, onto: Coords) -> Coords:
    """x [n, 3] rotated and moved onto another chain of its length, least squares (Kabsch, Acta Cryst. 1976)."""
    centre, target = x.mean(0), onto.mean(0)
    u, _, vt = np.linalg.svd((x - centre).T @ (onto - target))
    proper = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return (x - centre) @ (u @ proper @ vt) + target


def rmsd(a: Coords, b: Coords) -> float:
    """Root mean square distance of two chains of one length, in Angstrom, after the best rotation, mirrors not allowed."""
    return float(np.sqrt(((superposed(b, a) - a) ** 2).sum(1).mean()))


def tm_matrix(chains: Sequence[Coords]) -> Coords:
    """All pairs, [chains, chains], 1 on the diagonal."""
    found = np.eye(len(chains))
    for i, j in combinations(range(len(chains)), 2):
        found[i, j] = found[j, i] = tm_score(chains[i], chains[j])
    return found


def clusters(tm: Coords, same: float = SAME_FOLD) -> int:
    """Number of groups when each chain joins the first group whose founder it resembles by `same` or more."""
    founders: list[int] = []
    for i in range(len(tm)):
        if not any(tm[i, j] >= same for j in founders):
            founders.append(i)
    return len(founders)


def mean_pairwise(tm: Coords) -> float:
    """Mean over pairs of different chains, lower = more diverse; NaN for fewer than two."""
    i, j = np.triu_indices(len(tm), 1)
    return float(tm[i, j].mean()) if len(i) else float("nan")


def novelty(chains: Sequence[Coords], reference: Sequence[Coords]) -> float:
    """Mean over chains of the largest TM-score to any reference chain, lower = more novel."""
    best = [max(tm_score(x, y) for y in reference) for x in chains]
    return float(np.mean(best))
