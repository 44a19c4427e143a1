"""Precision, recall, density, coverage: the hand example, limits, symmetry, and the strict inequality."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation import prdc as module
from fewstep.evaluation.prdc import distances, neighbour_radii, prdc, precision_recall

from .peak_memory import needs_proc, peak_megabytes


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_fall_as_in_distances_summed_term_by_term(dtype):
    """Whole numbers on a small grid: many comparisons are ties, and many rows are equal."""
    draw = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 3, (n, 4), generator=draw).to(dtype) / 7 + 100 for n in (120, 100))
    inner, cross = distances(real.double(), real.double()), distances(fake.double(), real.double())
    radii = inner.fill_diagonal_(torch.inf).sort(1).values[:, 4]
    assert torch.equal(neighbour_radii(real, 5), radii)
    assert prdc(real, fake)["density"] == (cross < radii).sum().item() / (5 * 100)
    assert precision_recall(real, fake, 5)["precision"] == (cross <= radii).any(1).double().mean().item()
    assert (cross == radii).sum() > 400


def test_a_closed_ball_holds_its_edge():
    real = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    edge = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64)
    assert precision_recall(real, edge, k=1) == {"precision": 1, "recall": 0, "f_score": 0}


def test_precision_and_recall_agree_with_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = _features(120, 6), _features(100, 6, seed=1) * 1.1 + 0.3
    assert theirs.prc_features_to_metric(fake, real, verbose=False) == pytest.approx(precision_recall(real, fake))


def test_no_distance_is_held_for_all_pairs(monkeypatch):
    """The largest tensor made is a block of rows against one set, whatever the number of rows."""
    sizes = []
    monkeypatch.setattr(module, "_BLOCK", 8)
    monkeypatch.setattr(module, "_blocks", _watched(module._blocks, sizes))
    for n in (40, 400):
        prdc(_features(n, 3), _features(n, 3, seed=1))
        assert max(sizes) == 8 * n


def _watched(blocks, sizes):
    def watch(a, b):
        for rows, squares in blocks(a, b):
            sizes.append(squares.numel())
            yield rows, squares

    return watch


@pytest.mark.slow
@needs_proc
def test_memory_beside_the_features_grows_with_the_rows_and_not_with_their_square():
    """All pairs of 6,000 rows would be 288 MB a matrix, and there are three; 20,000 rows of 2048 numbers need 1.3 GB."""
    small, large = _extra_megabytes(3000), _extra_megabytes(6000)
    assert large < 2.6 * small  # squares would make it 4
    assert large < 400


def _extra_megabytes(n, d=256):
    before = (
        "import torch; from fewstep.evaluation.prdc import prdc\n"
        f"prdc(torch.randn(50, {d}), torch.randn(50, {d})); a, b = torch.randn(2, {n}, {d})"
    )
    return peak_megabytes(before, "prdc(a, b)")


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="more than 5 generated samples, not 5"):
        prdc(_features(20, 2), _features(5, 2))


def test_it_agrees_with_the_authors_package():
    theirs = pytest.importorskip("prdc")
    real, fake = _features(120, 6), _features(100, 6, seed=1) * 1.1 + 0.3
    assert prdc(real, fake, 5) == pytest.approx(theirs.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5))
