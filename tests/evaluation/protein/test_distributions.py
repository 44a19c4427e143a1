"""Distances of distributions against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluation.protein.distributions import energy_distance, wasserstein

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=37), 1.5 + 2 * RNG.normal(size=53)


def test_wasserstein_equals_scipys():
    stats = pytest.importorskip("scipy.stats")
    assert wasserstein(A, B) == pytest.approx(stats.wasserstein_distance(A, B))
    assert wasserstein(A, A[:20]) == pytest.approx(stats.wasserstein_distance(A, A[:20]))


def test_wasserstein_of_a_shift_is_the_shift():
    assert wasserstein(A, A + 0.7) == pytest.approx(0.7)
    assert wasserstein(A, A) == 0


def test_energy_distance_equals_scipys_in_one_dimension():
    stats = pytest.importorskip("scipy.stats")
    assert energy_distance(A[:, None], B[:, None]) == pytest.approx(stats.energy_distance(A, B))


def test_energy_distance_does_not_depend_on_how_rows_are_cut(monkeypatch):
    a, b = RNG.normal(size=(30, 4)), RNG.normal(size=(41, 4)) + 1
    whole = energy_distance(a, b)
    monkeypatch.setattr("fewstep.evaluation.protein.distributions._ROWS", 7)
    assert energy_distance(a, b) == pytest.approx(whole)


def test_energy_distance_sees_a_dependence_that_single_features_do_not():
    """Equal marginals, opposite correlation: every Wasserstein distance is 0, the energy distance is not."""
    x = RNG.normal(size=200)
    a, b = np.stack([x, x], 1), np.stack([x, -x], 1)
    b[:, 1] = np.sort(x)[np.argsort(np.argsort(-x))]  # the same numbers, in the other order
    assert max(wasserstein(a[:, i], b[:, i]) for i in range(2)) < 1e-12
    assert energy_distance(a, b) > 0.3
    assert energy_distance(a, a) == 0


def test_numbers_that_are_missing_are_left_out():
    hurt = np.concatenate([A, [np.nan]])
    assert wasserstein(hurt, B) == wasserstein(A, B)
    assert energy_distance(hurt[:, None], B[:, None]) == energy_distance(A[:, None], B[:, None])
    assert np.isnan(wasserstein(np.full(3, np.nan), B)) and np.isnan(
        energy_distance(np.full((3, 1), np.nan), B[:, None])
    )
