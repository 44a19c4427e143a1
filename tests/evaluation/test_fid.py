"""Frechet distance: closed form for diagonal Gaussians, invariances, streaming, bias of finite sets."""

import numpy as np
import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.fid import Moments, frechet_distance, gaussian_distance


def _features(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _rotation(d):
    return torch.linalg.qr(_features(d, d, seed=9)).Q


def test_diagonal_gaussians_have_the_closed_form():
    m1, m2, s1, s2 = (_features(4, 12, seed=1)[i] for i in range(4))
    s1, s2 = s1.abs(), s2.abs()
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    found = gaussian_distance(m1, s1.square().diag(), m2, s2.square().diag())
    assert found == pytest.approx(expected.item(), abs=1e-8)


def test_it_does_not_change_under_a_common_rotation():
    a, b, q = _features(200, 8), _features(150, 8, seed=1) * 2 + 1, _rotation(8)
    plain = frechet_distance(Moments.of(a), Moments.of(b))
    assert frechet_distance(Moments.of(a @ q), Moments.of(b @ q)) == pytest.approx(plain, abs=1e-9)


def test_it_is_symmetric_and_zero_for_equal_sets():
    a, b = Moments.of(_features(100, 6)), Moments.of(_features(100, 6, seed=1) * 3)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert frechet_distance(a, a) <= 1e-6


def test_a_singular_covariance_neither_fails_nor_goes_below_zero():
    few = Moments.of(_features(5, 64))  # rank 4 in 64 dimensions
    assert 0 <= frechet_distance(few, few) <= 1e-6
    line = Moments.of(_features(50, 1) @ torch.ones(1, 3, dtype=torch.float64))
    assert 0 <= frechet_distance(line, line) <= 1e-6


@pytest.mark.parametrize(("n1", "n2"), [(500, 500), (500, 2000)])
def test_equal_distributions_show_the_bias_of_finite_sets(n1, n2):
    """E FID = (1/n1 + 1/n2) (d + d (d + 1) / 4) to first order."""
    d, repeats = 8, 60
    predicted = (1 / n1 + 1 / n2) * (d + d * (d + 1) / 4)
    drawn = [(_features(n1, d, 2 * i), _features(n2, d, 2 * i + 1)) for i in range(repeats)]
    values = np.array([frechet_distance(Moments.of(a), Moments.of(b)) for a, b in drawn])
    assert abs(values.mean() - predicted) < 4 * values.std() / repeats**0.5 + 0.02 * predicted


def test_streamed_moments_equal_two_passes_of_numpy():
    x = _features(1000, 7) * torch.arange(1, 8) + 1e4  # a mean that swamps the spread
    streamed = Moments(7)
    for part in x.split(130):
        streamed.update(part)
    assert streamed.count == 1000
    assert np.allclose(streamed.mean.numpy(), x.numpy().mean(0), rtol=1e-14)
    assert np.allclose(streamed.covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)


def test_ranks_merge_to_the_moments_of_all_rows_whatever_their_share():
    x = _features(300, 5) + torch.arange(5)
    parts = [Moments.of(x[:10]), Moments.of(x[10:10]), Moments.of(x[10:])]
    merged = Moments(5)
    for part in parts:
        merged.merge(part)
    whole = Moments.of(x)
    assert merged.count == whole.count
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-13)
    assert torch.allclose(merged.covariance, whole.covariance, rtol=1e-12)


def test_float32_features_are_summed_in_float64():
    x = _features(4000, 3, dtype=torch.float32) + 1000
    expected = np.cov(x.double().numpy(), rowvar=False)
    assert np.allclose(Moments.of(x).covariance.numpy(), expected, rtol=1e-10)


def test_one_sample_has_no_covariance():
    with pytest.raises(UserError, match="at least 2 samples, not 1"):
        frechet_distance(Moments.of(_features(1, 4)), Moments.of(_features(9, 4)))


def test_it_agrees_with_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = _features(400, 16), _features(300, 16, seed=1) @ _rotation(16) * 1.3 + 0.2
    stats = [theirs.fid_features_to_statistics(x) for x in (a, b)]
    expected = theirs.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, abs=1e-8)
