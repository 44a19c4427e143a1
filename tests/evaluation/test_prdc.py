"""Precision, recall, density, coverage: the hand example, limits, symmetry, and the strict inequality."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation import prdc as module
from fewstep.evaluation.prdc import neighbour_radii, prdc


def _features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_example_on_a_line():
    real, fake = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.4], [10.0]])
    assert neighbour_radii(real, 1).tolist() == [1, 1, 1]
    assert neighbour_radii(fake.double(), 1).tolist() == pytest.approx([9.6, 9.6])
    found = prdc(real, fake, k=1)
    # 0.4 lies in the balls of 0 and 1: density 2 / (1 * 2); 2 is 1.6 away from it
    assert found == pytest.approx({"precision": 1 / 2, "recall": 1, "density": 1, "coverage": 2 / 3})


def test_clusters_far_apart_share_nothing():
    a = _features(50, 3)
    assert set(prdc(a, a + 1000).values()) == {0}


def test_equal_sets_cover_each_other():
    a = _features(60, 4)
    found = prdc(a, a.clone())
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["density"] >= 1


def test_swapping_the_sets_swaps_precision_and_recall():
    real, fake = _features(80, 3), _features(70, 3, seed=1) * 0.5
    there, back = prdc(real, fake), prdc(fake, real)
    assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])
    assert there["precision"] > there["recall"]  # a narrow fake set is precise and misses the rim


def test_a_point_on_the_edge_of_a_ball_is_outside():
    real = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    edge = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64)
    assert prdc(real, edge, k=1)["precision"] == 0
    assert prdc(real, edge + 1e-9, k=1)["precision"] == 1


@pytest.mark.parametrize("k", [3, 5])
def test_coverage_of_two_samples_of_one_distribution(k):
    """About 1 - 2^-k."""
    n = 600
    found = [prdc(_features(n, 4, 2 * i), _features(n, 4, 2 * i + 1), k)["coverage"] for i in range(8)]
    assert sum(found) / 8 == pytest.approx(1 - 2.0**-k, abs=0.02)


def test_blocks_do_not_change_the_numbers(monkeypatch):
    real, fake = _features(90, 5), _features(75, 5, seed=1)
    whole = prdc(real, fake)
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert prdc(real, fake) == whole


def test_a_tight_cluster_far_from_the_origin_keeps_its_distances():
    """The matrix-product form of the distance loses them all here."""
    near = _features(40, 64) * 1e-3
    assert prdc(near + 1e4, near.flip(0) + 1e4)["coverage"] == 1
    assert torch.allclose(neighbour_radii(near + 1e4, 5), neighbour_radii(near, 5), rtol=1e-6)


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="more than 5 generated samples, not 5"):
        prdc(_features(20, 2), _features(5, 2))


def test_it_agrees_with_the_authors_package():
    theirs = pytest.importorskip("prdc")
    real, fake = _features(120, 6), _features(100, 6, seed=1) * 1.1 + 0.3
    assert prdc(real, fake, 5) == pytest.approx(theirs.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5))
