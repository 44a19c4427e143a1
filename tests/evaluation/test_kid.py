"""Kernel distance: the closed form on a line, no bias, torch-fidelity's own draws, blocks."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation import kid as module
from fewstep.evaluation.kid import kernel_distance, squared_mmd


def _features(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_points_a_side_have_the_value_written_out():
    """k(x, y) = (x y + 1)^3: among {0, 1} it is 1, among {1, 2} 27; across 1, 1, 8, 27."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert squared_mmd(x, y) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_a_shift_has_the_distance_of_its_moments():
    """For N(0, I) and N(m, I): k sums the products of moments up to the third, so MMD^2 = sum |gap of moments|^2 C(3, p) / d^p."""
    d, shift = 1, 0.5
    x, y = _features(3000, d, 1), _features(3000, d, 2) + shift
    moments = [3 * shift**2, 3 * (shift**2) ** 2, (shift**3 + 3 * shift) ** 2]
    assert squared_mmd(x, y) == pytest.approx(sum(moments), rel=0.15)


@pytest.mark.parametrize("n", [10, 100])
def test_equal_distributions_have_no_distance_on_average_whatever_their_size(n):
    values = torch.tensor([squared_mmd(_features(n, 4, 2 * i), _features(n, 4, 2 * i + 1)) for i in range(200)])
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    assert values.min() < 0  # an estimate without bias falls to either side


def test_blocks_do_not_change_the_number(monkeypatch):
    x, y = _features(90), _features(70, seed=1) + 0.3
    whole = squared_mmd(x, y)
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert squared_mmd(x, y) == pytest.approx(whole, rel=1e-12)


def test_subsets_are_those_of_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    real, fake = _features(150), _features(120, seed=1) * 1.2 + 0.3
    said = theirs.kid_features_to_metric(fake, real, kid_subsets=7, kid_subset_size=40, verbose=False)
    found = kernel_distance(real, fake, subsets=7, size=40)
    assert found["kid"] == pytest.approx(said["kernel_inception_distance_mean"], rel=1e-9)
    assert found["kid_std"] == pytest.approx(said["kernel_inception_distance_std"], rel=1e-9)


def test_subsets_average_to_the_distance_of_all_pairs():
    real, fake = _features(300), _features(300, seed=1) * 1.5
    found = kernel_distance(real, fake, subsets=200, size=100)
    assert found["kid"] == pytest.approx(squared_mmd(real, fake), abs=4 * found["kid_std"] / 200**0.5)


def test_small_sets_are_taken_whole():
    real, fake = _features(30), _features(40, seed=1)
    assert kernel_distance(real, fake[:30], subsets=3)["kid_std"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="at least 2 samples of each set, not 30 and 1"):
        squared_mmd(real, fake[:1])
