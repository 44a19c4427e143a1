"""Shape of one chain of CA atoms, x [residues, 3] in Angstrom: numbers that hold for any real backbone.

Real trans peptides have consecutive CA 3.80 +- 0.05 apart; cis ones, which are rare, 2.95.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Coords = NDArray[np.float64]
BOND = 3.8
HELIX_DIHEDRAL = 50.0  # of consecutive CA in a right-handed alpha helix, degrees


@dataclass(frozen=True)
class Limits:
    """What counts as valid. Lengths in Angstrom, angles in degrees.

    bond, loose_bond: largest deviation of a bond from 3.8. bonded: smallest share of bonds within `bond`.
    skipped: window of the distance i, i+2. clash: smallest distance of CA three or more apart in the chain. clashing:
    most such pairs that are nearer, per residue.
    compact: window of the radius of gyration over 2.2 n^0.38. left_handed: window of dihedrals of a left-handed helix,
    in runs of at least `left_run`. mirrored: largest share of helical residues in such runs; real chains have none.
    """

    bond: float = 0.2
    loose_bond: float = 0.5
    bonded: float = 0.98
    skipped: tuple[float, float] = (4.6, 7.5)
    clash: float = 3.6
    clashing: float = 0.01
    compact: tuple[float, float] = (0.8, 1.4)
    left_handed: tuple[float, float] = (-70.0, -30.0)
    left_run: int = 4
    mirrored: float = 0.0


LIMITS = Limits()


@dataclass(frozen=True)
class Shape:
    """Numbers of one chain; shares lie in 0..1.

    bond, bond_std: mean and standard deviation of consecutive distances; bond_error: their mean deviation from 3.8 in
    absolute value. bonded, loosely_bonded: share of them near 3.8.
    skipped: share of the distances i, i+2 in their window. clashes: pairs too close, per residue. compactness: radius of
    gyration over 2.2 n^0.38. contacts: share of residues with a CA within 8 six or more apart. contact_order: mean
    separation of such pairs over n. left_handed: share of helical residues in left-handed runs, NaN without any.
    """

    n: int
    bond: float
    bond_std: float
    bond_error: float
    bonded: float
    loosely_bonded: float
    skipped: float
    clashes: float
    compactness: float
    contacts: float
    contact_order: float
    left_handed: float
    valid: bool


def shape(x: Coords, limits: Limits = LIMITS) -> Shape:
    """All numbers of a chain of at least 4 residues; NaN coordinates make it invalid."""
    if len(x) < 4 or not np.isfinite(x).all():
        unknown = {field.name: float("nan") for field in fields(Shape) if field.name not in ("n", "valid")}
        return Shape(n=len(x), **unknown, valid=False)
    bonds, skips = distances(x, 1), distances(x, 2)
    near = np.abs(bonds - BOND)
    contacts, order = contact_numbers(x)
    numbers = {
        "bond": float(bonds.mean()),
        "bond_std": float(bonds.std()),
        "bond_error": float(near.mean()),
        "bonded": float((near < limits.bond).mean()),
        "loosely_bonded": float((near < limits.loose_bond).mean()),
        "skipped": float(((skips > limits.skipped[0]) & (skips < limits.skipped[1])).mean()),
        "clashes": clash_count(x, limits.clash) / len(x),
        "compactness": radius_of_gyration(x) / expected_radius(len(x)),
        "contacts": contacts,
        "contact_order": order,
        "left_handed": left_handed_share(x, limits),
    }
    return Shape(n=len(x), **numbers, valid=_valid(numbers, limits))


def _valid(numbers: Mapping[str, float], limits: Limits) -> bool:
    """Bonds, clashes, compactness and handedness together; a chain without helices (NaN) is not left-handed."""
    return (
        numbers["bonded"] >= limits.bonded
        and numbers["clashes"] <= limits.clashing
        and limits.compact[0] <= numbers["compactness"] <= limits.compact[1]
        and not numbers["left_handed"] > limits.mirrored
    )


def distances(x: Coords, apart: int) -> Coords:
    """|x_{i + apart} - x_i|, [residues - apart]."""
    return np.linalg.norm(x[apart:] - x[:-apart], axis=1)


def angles(x: Coords) -> Coords:
    """Angles at the inner CA of three consecutive ones, degrees, [residues - 2]."""
    a, b = x[:-2] - x[1:-1], x[2:] - x[1:-1]
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)).clip(1e-9)
    return np.degrees(np.arccos(cosine.clip(-1, 1)))


def dihedrals(x: Coords) -> Coords:
    """Dihedral angles of four consecutive CA, degrees in (-180, 180], [residues - 3]; + is right-handed."""
    b = np.diff(x, axis=0)
    first, axis, last = b[:-2], b[1:-1], b[2:]
    n1, n2 = np.cross(first, axis), np.cross(axis, last)
    sine = (np.linalg.norm(axis, axis=1) * (first * n2).sum(1)) if len(axis) else np.zeros(0)
    return np.degrees(np.arctan2(sine, (n1 * n2).sum(1)))


def pair_distances(x: Coords) -> Coords:
    """[residues, residues]"""
    return np.linalg.norm(x[:, None] - x[None], axis=2)


def clash_count(x: Coords, closest: float) -> int:
    """Pairs three or more apart in the chain that are nearer than `closest`."""
    i, j = np.triu_indices(len(x), 3)
    return int((pair_distances(x)[i, j] < closest).sum())


def radius_of_gyration(x: Coords) -> float:
    """Root mean square distance from the centre."""
    return float(np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()))


def expected_radius(n: int) -> float:
    """2.2 n^0.38, the law of single globular domains."""
    return float(2.2 * n**0.38)


def contact_numbers(x: Coords, within: float = 8.0, apart: int = 6) -> tuple[float, float]:
    """Share of residues in contact, and the relative contact order (mean separation of contacts over n; 0 without any)."""
    i, j = np.triu_indices(len(x), apart)
    near = pair_distances(x)[i, j] < within
    i, j = i[near], j[near]
    touched = len(np.union1d(i, j)) / len(x)
    return touched, float((j - i).mean() / len(x)) if len(i) else 0.0


def left_handed_share(x: Coords, limits: Limits = LIMITS) -> float:
    """Dihedrals in left-handed helical runs, over those in left- and right-handed ones; NaN without helices.

    The mirror image of a helix keeps all distances, so nothing but this tells it.
    """
    low, high = limits.left_handed
    turn = dihedrals(x)
    left = _in_runs((turn >= low) & (turn <= high), limits.left_run)
    right = _in_runs((turn >= -high) & (turn <= -low), limits.left_run)
    return left / (left + right) if left + right else float("nan")


def _in_runs(yes: NDArray[np.bool_], shortest: int) -> int:
    """How many of `yes` lie in runs of at least `shortest`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], yes, [False]]).astype(np.int8)))
    runs = edges[1::2] - edges[::2]
    return int(runs[runs >= shortest].sum())
