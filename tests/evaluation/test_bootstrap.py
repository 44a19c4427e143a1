"""Intervals and the sign test against closed forms."""

from math import comb

import pytest
import torch

from fewstep.evaluation.bootstrap import mean_interval, sign_test, two_sided


def _normal(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_normal_values_is_196_standard_errors_wide():
    x = 3 + 2 * _normal(900)
    found = mean_interval(x)
    error = x.std(unbiased=False).item() / 30  # the bootstrap knows the sample's own spread
    assert found.mean == pytest.approx(x.mean().item())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (found.high + found.low) / 2 == pytest.approx(found.mean, abs=0.15 * error)


def test_nineteen_of_twenty_intervals_hold_the_mean():
    """A binomial of 300 draws at .95 has a standard deviation of 3.8."""
    held = sum(
        found.low <= 0 <= found.high
        for seed in range(300)
        for found in (mean_interval(_normal(60, seed), resamples=300, seed=seed),)
    )
    assert 270 <= held <= 298


def test_the_interval_does_not_depend_on_how_resamples_are_cut(monkeypatch):
    whole = mean_interval(_normal(50))
    monkeypatch.setattr("fewstep.evaluation.bootstrap._DRAWN", 5000)
    parts = mean_interval(_normal(50))
    assert (whole.low, whole.high) == pytest.approx((parts.low, parts.high))
    assert mean_interval(_normal(50)) == parts


def test_equal_values_have_an_interval_of_no_width():
    assert (mean_interval(torch.full((7,), 0.3)).low, mean_interval(torch.full((7,), 0.3)).high) == pytest.approx(
        (0.3, 0.3)
    )


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (2, 8), (5, 5), (1, 0), (0, 0), (10, 0)])
def test_the_sign_test_is_the_binomials_two_tails(wins, losses):
    found = sign_test(torch.tensor([1.0] * wins + [-0.5] * losses + [0.0] * 3))
    m, fewer = wins + losses, min(wins, losses)
    exact = min(1.0, 2 * sum(comb(m, k) for k in range(fewer + 1)) / 2**m)
    assert (found.wins, found.losses, found.ties) == (wins, losses, 3)
    assert found.p == pytest.approx(exact, rel=1e-9)


def test_tens_of_thousands_of_pairs_do_not_overflow():
    """15,200 of 30,000 is 2.31 standard deviations off the middle: p = .0209, with the correction for whole numbers .0214."""
    assert two_sided(14_800, 30_000) == pytest.approx(0.0214, abs=2e-4)
    assert two_sided(10_000, 30_000) < 1e-300 or two_sided(10_000, 30_000) == 0
