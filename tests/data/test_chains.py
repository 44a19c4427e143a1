"""Chains as rows: units, crops, rotations, padding, and lengths alone."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.chains import Chains, Lengths, padded, rotations
from fewstep.draws import Draw
from fewstep.errors import UserError


def draw(rows: int, step: int = 0) -> Draw:
    """The numbers of a step."""
    return Draw(0, step, range(rows))


def test_rows_are_centred_nanometres_with_zero_padding():
    """Bonds of .38; the mask counts residues."""
    rows = Chains(shortest=40, longest=60).fetch(torch.arange(64), draw(64))
    x, mask = rows["x0"], rows["cond"]["mask"]
    assert x.shape == (64, 64, 3) and not x[~mask].any()
    assert (x.sum(1) / mask.sum(1, keepdim=True)).abs().max() < 1e-6
    both = mask[:, 1:] & mask[:, :-1]
    assert x.diff(dim=1).norm(dim=2)[both].mean().item() == pytest.approx(0.38, abs=0.002)
    assert mask.sum(1).min() >= 40 and mask.sum(1).max() <= 60


def test_long_chains_are_cropped_to_unbroken_pieces_anywhere():
    """Two steps see other parts of a chain; without a draw it is the first part."""
    source = Chains(shortest=64, longest=64)
    ids = torch.tensor([i for i, chain in enumerate(source.chains) if len(chain.x) > 100][:32])
    one, two, plain = (source.fetch(ids, d)["x0"] for d in (draw(32), draw(32, 1), None))
    apart = [torch.cdist(x, x) for x in (one, two)]
    assert (apart[0] - apart[1]).flatten(1).abs().amax(1).gt(0.1).float().mean() > 0.9
    assert one.diff(dim=1).norm(dim=2).max() < 0.42
    first = torch.from_numpy(source.chains[int(ids[0])].x[:64]) / 10
    torch.testing.assert_close(plain[0], first - first.mean(0))


def test_whole_leaves_long_chains_out():
    """And none in range is an error that names the bounds."""
    assert max(len(c.x) for c in Chains(shortest=40, longest=64, whole=True).chains) <= 64
    with pytest.raises(UserError, match="change shortest"):
        Chains(shortest=5000, longest=6000)


def test_rotations_are_proper_and_uniform():
    """R R' = 1, det R = 1; over many draws each entry has mean 0 and variance 1/3."""
    turned = rotations(torch.randn(40_000, 4, generator=torch.Generator().manual_seed(0)))
    eye = torch.eye(3).expand_as(turned)
    torch.testing.assert_close(turned @ turned.transpose(1, 2), eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(len(turned)), atol=1e-5, rtol=0)
    assert turned.mean(0).abs().max() < 0.015 and (turned.var(0) - 1 / 3).abs().max() < 0.01


def test_a_row_depends_on_its_slot_and_chain_alone():
    """Whatever batch it is in."""
    source = Chains(shortest=60, longest=64)
    all_rows = source.fetch(torch.arange(8), draw(8))["x0"]
    later = source.fetch(torch.arange(4, 8), Draw(0, 0, range(4, 8)))["x0"]
    assert torch.equal(all_rows[4:], later)


def test_lengths_are_every_length_of_the_range_equally_often():
    """Masks alone, padded to one length."""
    source = Lengths(shortest=50, longest=59)
    cond = source.fetch(torch.arange(1000), None)["cond"]
    assert set(cond) == {"mask"} and cond["mask"].shape == (1000, 64)
    assert cond["mask"].sum(1).bincount()[50:60].tolist() == [100] * 10


@pytest.mark.parametrize("source", [Lengths, Chains])
def test_bounds_out_of_order_or_range_are_refused(source):
    """By name."""
    with pytest.raises(UserError, match="shortest"):
        source(shortest=80, longest=70)
    with pytest.raises(UserError, match="shortest"):
        source(shortest=2, longest=70)


def test_padded_lengths_are_multiples_of_eight():
    """The next one."""
    assert [padded(n) for n in (1, 8, 9, 64)] == [8, 8, 16, 64]
