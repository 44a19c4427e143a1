"""Scores of a set of chains: validity, secondary structure, diversity, novelty, and how far it is from another set.

values = score_chains(chains, reference=real)        # chains: arrays [residues, 3] in Angstrom
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .distributions import energy_distance, wasserstein
from .geometry import LIMITS, Coords, Limits, Shape, distances, shape
from .secondary_structure import secondary_structure, shares
from .similarity import clusters, mean_pairwise, novelty, tm_matrix

T = TypeVar("T")

SEPARATIONS = range(2, 13)  # along the chain, of the distances that two sets are compared by
MOST_COMPARED = 60  # chains of which all pairs are aligned; an alignment takes milliseconds
MEANS = (
    "valid",
    "bond",
    "bond_std",
    "bond_error",
    "bonded",
    "loosely_bonded",
    "skipped",
    "clashes",
    "compactness",
    "contacts",
    "contact_order",
    "helix",
    "strand",
    "left_handed",
)
FEATURES = ("compactness", "helix", "strand", "contact_order")  # what the distributions of two sets are compared in
ALIGNED = ("diversity", "folds", "novelty")  # values made from TM-scores


@dataclass(frozen=True)
class Described:
    """A chain x [residues, 3] in Angstrom with its numbers; helix and strand are shares of residues."""

    x: Coords
    shape: Shape
    helix: float
    strand: float

    def number(self, name: str) -> float:
        """Any of MEANS."""
        return float(getattr(self if name in ("helix", "strand") else self.shape, name))


def described(x: Coords, limits: Limits = LIMITS) -> Described:
    """All that is said of one chain; shares are NaN where coordinates are not numbers or fewer than 6."""
    known = np.isfinite(x).all() and len(x) > 5
    helix, strand = shares(secondary_structure(x)) if known else (float("nan"), float("nan"))
    return Described(x, shape(x, limits), helix, strand)


def score_chains(
    chains: Sequence[Coords],
    reference: Sequence[Coords] | None = None,
    limits: Limits = LIMITS,
    compared: int = MOST_COMPARED,
) -> dict[str, float]:
    """Numbers of a set of chains [residues, 3] in Angstrom.

    valid: share of valid chains. bond, bond_std, bond_error, bonded, loosely_bonded, skipped, clashes, compactness,
    contacts, contact_order: means of `Shape`. helix, strand: shares of residues. left_handed: of helical residues.
    diversity: mean pairwise TM-score of valid chains, lower = more diverse; folds: their clusters at .5 over their number.
    With a reference: novelty (mean best TM-score of valid chains to it, lower = more novel), `w1_*` (Wasserstein-1 of a
    feature in units of the reference's standard deviation) and `energy` (energy distance of feature vectors, same units).
    TM-scores are found for at most `compared` chains of either set, at equal distances. A number that a set has not (the
    handedness of helices without any) is left out.
    """
    found, known = ([described(np.asarray(x, float), limits) for x in group] for group in (chains, reference or ()))
    return scores_of(found, known, compared)


def scores_of(
    found: Sequence[Described],
    known: Sequence[Described] = (),
    compared: int = MOST_COMPARED,
) -> dict[str, float]:
    """`score_chains` of chains, and of a reference, that are described already."""
    values = {name: _mean([d.number(name) for d in found]) for name in MEANS}
    good = spread([d.x for d in found if d.shape.valid], compared)
    if len(good) > 1:
        tm = tm_matrix(good)
        values.update(diversity=mean_pairwise(tm), folds=clusters(tm) / len(good))
    if good and known:
        values["novelty"] = novelty(good, spread([d.x for d in known], compared))
    if known:
        values.update(set_distances(found, known))
    return {name: value for name, value in values.items() if np.isfinite(value)}


def set_distances(found: Sequence[Described], known: Sequence[Described]) -> dict[str, float]:
    """Wasserstein-1 between two sets, feature by feature, and the energy distance of FEATURES together.

    In units of the second set's standard deviation. w1_distances: mean over separations k = 2 .. 12 along the chain of
    that of the distances i, i + k.
    """
    a, b = ([[d.number(name) for name in FEATURES] for d in group] for group in (found, known))
    unit = np.nanstd(b, axis=0).clip(1e-9)
    a, b = np.asarray(a) / unit, np.asarray(b) / unit
    values = {f"w1_{name}": wasserstein(a[:, i], b[:, i]) for i, name in enumerate(FEATURES)}
    return {**values, "w1_distances": _distances_apart(found, known), "energy": energy_distance(a, b)}


def _distances_apart(found: Sequence[Described], known: Sequence[Described]) -> float:
    apart = []
    for k in SEPARATIONS:
        a, b = (np.concatenate([distances(d.x, k) for d in group]) for group in (found, known))
        apart.append(wasserstein(a, b) / max(float(np.nanstd(b)), 1e-9) if len(b) else float("nan"))
    return _mean(apart)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, at equal distances: sets are often sorted by length."""
    n = min(len(items), most)
    return [items[i * len(items) // n] for i in range(n)]


def _mean(values: Sequence[float]) -> float:
    """Without NaN; NaN when there is nothing else."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")
