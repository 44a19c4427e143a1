"""Pairs within groups, Beta quantiles, CutMix maps."""

from __future__ import annotations

import pytest
import torch

from fewstep.maths.mixing import beta_quantile, cutmix_map, partners_within


def test_partners_are_a_permutation_that_stays_in_the_group():
    group = torch.randint(0, 30, (200,))
    partner = partners_within(group, torch.rand(200))
    assert torch.equal(partner.sort().values, torch.arange(200))
    assert torch.equal(group[partner], group)
    alone = group.bincount()[group] == 1
    assert torch.equal(partner == torch.arange(200), alone)


def test_every_other_member_is_an_equally_likely_partner():
    group = torch.zeros(4, dtype=torch.int64)
    drawn = torch.stack([partners_within(group, torch.rand(4)) for _ in range(3000)])
    share = (drawn[:, 0, None] == torch.arange(4)).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]), rtol=0, atol=0.04)


@pytest.mark.parametrize("a", [0.5, 0.8, 1.0, 2.0])
def test_quantiles_are_those_of_the_beta_distribution(a):
    scipy_stats = pytest.importorskip("scipy.stats")
    u = torch.rand(2000, dtype=torch.float64)
    expected = torch.from_numpy(scipy_stats.beta.ppf(u.numpy(), a, a))
    torch.testing.assert_close(beta_quantile(u, a), expected, rtol=0, atol=1e-6)


def test_quantiles_reach_both_ends():
    ends = beta_quantile(torch.tensor([0.0, 0.5, 1.0]), 0.8)
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.5, 1.0]), rtol=0, atol=1e-6)


def test_the_true_share_is_one_minus_pasted_area():
    """lambda = 1 - area / total, counted in pixels, also where the border cuts the box off."""
    share, centre = torch.rand(300), torch.rand(300, 2)
    keep = cutmix_map(share, centre, 20, 30)
    area = (keep == 0).sum((1, 2, 3))
    assert keep.shape == (300, 1, 20, 30) and keep.unique().tolist() == [0, 1]
    torch.testing.assert_close(keep.mean((1, 2, 3)), 1 - area / 600)


def test_a_box_away_from_the_border_has_the_share_asked_for():
    keep = cutmix_map(torch.tensor([0.75, 1.0, 0.0]), torch.full((3, 2), 0.5), 20, 20)
    assert keep.mean((1, 2, 3)).tolist() == [0.75, 1.0, 0.0]
    assert keep[0, 0, 5:15, 5:15].sum() == 0
