"""Scores of a set of chains: validity, secondary structure, diversity, novelty, and how far it is from another set.

values = score_chains(chains, reference=real)        # chains: arrays [residues, 3] in Angstrom
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .geometry import LIMITS, Coords, Limits, Shape, distances, shape
from .secondary_structure import secondary_structure, shares
from .similarity import clusters, mean_pairwise, novelty, tm_matrix

SEPARATIONS = range(2, 13)  # along the chain, of the distances that two sets are compared by
MOST_COMPARED = 60  # chains whose TM-scores are found, all pairs


@dataclass(frozen=True)
class Described:
    """A chain's numbers; helix and strand are shares."""

    shape: Shape
    helix: float
    strand: float
    x: Coords


def described(x: Coords, limits: Limits = LIMITS) -> Described:
    """All that is said of one chain."""
    helix, strand = shares(secondary_structure(x)) if np.isfinite(x).all() and len(x) > 5 else (0.0, 0.0)
    return Described(shape(x, limits), helix, strand, x)


def score_chains(
    chains: Sequence[Coords],
    reference: Sequence[Coords] | None = None,
    limits: Limits = LIMITS,
    compared: int = MOST_COMPARED,
) -> dict[str, float]:
    """Numbers of a set.

    valid: share of valid chains. bond, bond_std, bonded, skipped, clashes, compactness, contacts, contact_order: means
    over chains (lengths in Angstrom). helix, strand: shares of residues. left_handed: of helical residues.
    diversity: mean pairwise TM-score of valid chains, lower = more diverse; folds: their clusters at .5 over their number;
    at most `compared` of them, the first. With a reference: novelty (mean best TM-score to it) and distances of
    distributions `w1_*` (Wasserstein-1 in units of the reference's standard deviation).
    """
    found = [described(np.asarray(x, float), limits) for x in chains]
    names = (
        "bond",
        "bond_std",
        "bonded",
        "loosely_bonded",
        "skipped",
        "clashes",
        "compactness",
        "contacts",
        "contact_order",
    )
    values = {name: _mean([getattr(d.shape, name) for d in found]) for name in names}
    values = {"valid": _mean([d.shape.valid for d in found]), **values}
    values["helix"], values["strand"] = _mean([d.helix for d in found]), _mean([d.strand for d in found])
    values["left_handed"] = _mean([d.shape.left_handed for d in found])
    good = [d.x for d in found if d.shape.valid][:compared]
    if len(good) > 1:
        tm = tm_matrix(good)
        values["diversity"], values["folds"] = mean_pairwise(tm), clusters(tm) / len(good)
    if reference is not None:
        known = [described(np.asarray(x, float), limits) for x in reference]
        if good:
            values["novelty"] = novelty(good, [d.x for d in known][:compared])
        values.update(set_distances(found, known))
    return values


def set_distances(found: Sequence[Described], known: Sequence[Described]) -> dict[str, float]:
    """Wasserstein-1 between two sets, feature by feature, over the second one's standard deviation."""
    features = {
        "compactness": lambda d: [d.shape.compactness],
        "helix": lambda d: [d.helix],
        "strand": lambda d: [d.strand],
        "contact_order": lambda d: [d.shape.contact_order],
        "distances": lambda d: np.concatenate([distances(d.x, k) for k in SEPARATIONS if len(d.x) > k]),
    }
    pairs = {
        name: [np.concatenate([np.asarray(of(d), float) for d in group]) for group in (found, known)]
        for name, of in features.items()
    }
    return {f"w1_{name}": wasserstein(a, b) / max(float(np.nanstd(b)), 1e-9) for name, (a, b) in pairs.items()}


def wasserstein(a: Coords, b: Coords) -> float:
    """Wasserstein-1 distance of two samples of numbers: the area between their quantile functions."""
    a, b = np.sort(a[np.isfinite(a)]), np.sort(b[np.isfinite(b)])
    if not len(a) or not len(b):
        return float("nan")
    levels = np.sort(np.concatenate([np.arange(1, len(a)) / len(a), np.arange(1, len(b)) / len(b), [0.0, 1.0]]))
    middle, width = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    return float((np.abs(_quantile(a, middle) - _quantile(b, middle)) * width).sum())


def _quantile(ordered: Coords, level: Coords) -> Coords:
    return ordered[np.minimum((level * len(ordered)).astype(int), len(ordered) - 1)]


def _mean(values: Sequence[float]) -> float:
    """Without NaN; NaN when there is nothing else."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")
