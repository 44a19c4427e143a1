"""Numbers of one chain: ideal geometry, invariances, what is refused, and real chains."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from fewstep.data.chains import shipped
from fewstep.evaluation.protein.geometry import (
    angles,
    contact_numbers,
    dihedrals,
    distances,
    expected_radius,
    left_handed_share,
    radius_of_gyration,
    shape,
)

from .chains import helix, mirrored, strand, turned


@pytest.mark.parametrize(
    "x, apart, angle, dihedral",
    [
        (helix(), (3.83, 5.43, 5.05, 6.20), 90.4, 50.0),
        (strand(), (3.80, 6.62, 10.05, 13.2), 121.0, -163.0),
    ],
    ids=["helix", "strand"],
)
def test_ideal_helix_and_strand_have_their_distances_and_angles(x, apart, angle, dihedral):
    """d(i, i+1..4), the CA angle and the CA dihedral of textbook parameters."""
    assert [distances(x, k).mean() for k in (1, 2, 3, 4)] == pytest.approx(apart, abs=0.05)
    assert angles(x).mean() == pytest.approx(angle, abs=0.5)
    assert dihedrals(x).mean() == pytest.approx(dihedral, abs=0.5)


@pytest.mark.parametrize("x", [helix(40), strand(40), shipped()[0].x.astype(float)], ids=["helix", "strand", "real"])
def test_no_number_changes_when_a_chain_is_turned_and_moved(x):
    before, after = asdict(shape(x)), asdict(shape(turned(x)))
    assert after == pytest.approx(before, abs=1e-6, nan_ok=True)


def test_a_mirror_image_differs_in_handedness_alone():
    """All distances stay, so nothing but the dihedrals' sign tells a mirrored helix."""
    right, left = asdict(shape(helix(20))), asdict(shape(mirrored(helix(20))))
    assert (right.pop("left_handed"), left.pop("left_handed")) == (0.0, 1.0)
    assert (right.pop("valid"), left.pop("valid")) == (True, False)
    assert left == pytest.approx(right)
    assert np.allclose(dihedrals(mirrored(helix())), -dihedrals(helix()))


def test_left_handed_share_counts_runs_of_four_and_more():
    """Two helices of one length, one mirrored, count the same; three dihedrals in a row do not count."""
    assert left_handed_share(mirrored(helix(6))) != left_handed_share(mirrored(helix(6)))  # NaN: a run of three
    assert left_handed_share(mirrored(helix(7))) == 1.0
    assert left_handed_share(strand()) != left_handed_share(strand())  # NaN: no helix


def test_a_random_chain_is_invalid():
    """Gaussian coordinates of a protein's size: no bonds, many clashes."""
    found = shape(6.0 * np.random.default_rng(0).normal(size=(100, 3)))
    assert not found.valid and found.bonded < 0.1 and found.clashes > 0.5


def test_ten_times_too_small_is_invalid():
    """Nanometres taken for Angstrom: all bonds are .38."""
    x = shipped()[0].x.astype(float)
    assert shape(x).valid and not shape(x / 10).valid
    assert shape(x / 10).bond == pytest.approx(0.38, abs=0.01)


def test_coordinates_that_are_not_numbers_make_a_chain_invalid():
    x = helix()
    x[3, 1] = np.nan
    assert not shape(x).valid and not shape(x[:3]).valid


def test_radius_of_gyration_of_a_straight_line():
    """n points a apart: a sqrt((n^2 - 1) / 12); the law of globules is 2.2 n^0.38."""
    line = np.zeros((11, 3))
    line[:, 0] = 2.0 * np.arange(11)
    assert radius_of_gyration(line) == pytest.approx(2 * np.sqrt(120 / 12))
    assert expected_radius(100) == pytest.approx(2.2 * 100**0.38)


def test_contacts_of_a_hairpin():
    """Two antiparallel strands 5 apart: every residue at six or more is in contact, order = mean separation over n."""
    n = 10
    up, down = np.zeros((n, 3)), np.zeros((n, 3))
    up[:, 2], down[:, 2] = 3.8 * np.arange(n), 3.8 * np.arange(n)[::-1]
    down[:, 0] = 5.0
    x = np.concatenate([up, down])
    touched, order = contact_numbers(x)
    pairs = [(i, j) for i in range(2 * n) for j in range(i + 6, 2 * n) if np.linalg.norm(x[i] - x[j]) < 8]
    assert touched == len({i for pair in pairs for i in pair}) / (2 * n)
    assert order == pytest.approx(np.mean([j - i for i, j in pairs]) / (2 * n))
    assert contact_numbers(strand()) == (0.0, 0.0)


def test_real_chains_are_valid():
    """Calibration: of 300 shipped real chains more than 95 % are valid, and their bonds are 3.81 on average."""
    found = [shape(c.x.astype(float)) for c in shipped()[::10]]
    assert np.mean([s.valid for s in found]) > 0.95
    assert np.mean([s.bond for s in found]) == pytest.approx(3.81, abs=0.01)
    assert np.mean([s.bonded for s in found]) > 0.99
    assert np.nanmean([s.left_handed for s in found]) < 0.01
