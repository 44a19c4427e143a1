"""TM-scores and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.data.chains import shipped
from fewstep.errors import UserError
from fewstep.evaluation.protein import similarity
from fewstep.evaluation.protein.similarity import (
    clusters,
    mean_pairwise,
    novelty,
    superposed,
    superposed_tm,
    tm_matrix,
    tm_score,
)

from .chains import helix, mirrored, turned

REAL = [c.x.astype(float) for c in shipped()[:4]]


@pytest.fixture
def without_tmtools(monkeypatch):
    def refused(name):
        raise ImportError(name)

    monkeypatch.setattr(similarity, "import_module", refused)


@pytest.mark.parametrize("score", [superposed_tm, tm_score])
def test_a_chain_equals_itself_however_it_lies(score):
    assert score(REAL[0], turned(REAL[0])) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("score", [superposed_tm, tm_score])
def test_a_mirror_image_is_another_chain(score):
    assert score(REAL[0], mirrored(REAL[0])) < 0.6
    assert score(helix(), mirrored(helix())) < 0.5


def test_superposition_is_the_least_squares_rotation():
    """No small further rotation lowers the distance (Kabsch)."""
    a, b = REAL[0], REAL[0] + np.random.default_rng(0).normal(size=REAL[0].shape)
    placed = superposed(turned(b), a)
    best = ((placed - a) ** 2).sum()
    for axis in np.eye(3):
        k = np.cross(np.eye(3), axis)
        moved = (placed - a.mean(0)) @ (np.eye(3) + 0.02 * k + 0.0002 * k @ k) + a.mean(0)
        assert ((moved - a) ** 2).sum() > best


def test_superposed_tm_never_exceeds_that_of_the_alignment():
    pytest.importorskip("tmtools")
    n = 60
    for x, y in ((REAL[0], REAL[1]), (REAL[1], REAL[2])):
        assert superposed_tm(x[:n], y[:n]) <= tm_score(x[:n], y[:n]) + 1e-3


def test_without_tmtools_chains_of_one_length_are_laid_over_each_other(without_tmtools):
    assert tm_score(REAL[0], turned(REAL[0])) == pytest.approx(1.0)
    with pytest.raises(UserError, match="pip install tmtools"):
        tm_score(REAL[0], REAL[0][:-1])


def test_clusters_and_mean_of_a_matrix():
    """a and b alike, c apart: two groups; the mean is over the three pairs."""
    tm = np.array([[1, 0.8, 0.2], [0.8, 1, 0.3], [0.2, 0.3, 1]])
    assert clusters(tm) == 2 and clusters(tm, same=0.9) == 3
    assert mean_pairwise(tm) == pytest.approx((0.8 + 0.2 + 0.3) / 3)
    assert np.isnan(mean_pairwise(np.eye(1)))


def test_matrix_and_novelty(without_tmtools):
    same = [REAL[0], turned(REAL[0])]
    assert np.allclose(tm_matrix(same), 1.0)
    assert novelty([REAL[0]], same) == pytest.approx(1.0)
    assert novelty([REAL[0]], [mirrored(REAL[0])]) < 0.6
