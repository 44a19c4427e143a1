"""The family of protein backbones: calls, signs, masks, sizes."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.models.protein_flow import PROTEIN_FLOW, SIZES


def cond() -> Cond:
    """Two chains of 5 and 8 residues."""
    return Cond(mask=torch.arange(8)[None] < torch.tensor([[5], [8]]))


def test_the_network_is_told_one_minus_t_and_answers_minus_the_velocity():
    """tau = 1 - t, u = data - noise = -v."""
    x, t = torch.randn(2, 8, 3), torch.tensor([0.2, 0.9])
    said = PROTEIN_FLOW.pack(torch.nn.Identity(), x, t, cond())
    torch.testing.assert_close(said["tau"], torch.tensor([0.8, 0.1]))
    assert set(said) == {"x", "tau", "mask"} and said["x"] is x
    assert torch.equal(PROTEIN_FLOW.unpack(torch.nn.Identity(), x, x), -x)


def test_chains_are_centred_over_their_residues():
    """Mean 0, padding 0, and once is enough."""
    x = PROTEIN_FLOW.project(torch.randn(2, 8, 3) + 5, cond())
    assert x.sum(1).abs().max() < 1e-5 and not x[0, 5:].any()
    torch.testing.assert_close(PROTEIN_FLOW.project(x, cond()), x)


def test_means_are_over_residues_and_axes():
    """Padding counts in neither numerator nor denominator."""
    x = torch.ones(2, 8, 3)
    x[0, 5:] = 100
    assert PROTEIN_FLOW.mean_rows(x, cond()).tolist() == [1, 1]
    assert PROTEIN_FLOW.lengths(cond()).tolist() == [5, 8]


def test_a_network_without_fold_labels_cannot_be_guided():
    """One with them is told that nothing is known."""
    with pytest.raises(UserError, match="guidance_scale 1"):
        PROTEIN_FLOW.null(PROTEIN_FLOW.build(size="tiny").module, cond())
    module = PROTEIN_FLOW.build(size="tiny", cath_classes=(2, 3, 4)).module
    null = PROTEIN_FLOW.null(module, cond().with_(cath=torch.ones(2, 3, dtype=torch.long)))
    assert not null["cath"].any() and null["cath"].shape == (2, 3)


def test_unknown_sizes_and_keys_name_the_nearest():
    """As every family."""
    with pytest.raises(UserError, match="tiny"):
        PROTEIN_FLOW.build(size="tinny")
    with pytest.raises(UserError, match="num_layers"):
        PROTEIN_FLOW.build(size="tiny", num_layer=2)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_can_be_made(size):
    """On the meta device."""
    with torch.device("meta"):
        module = PROTEIN_FLOW.build(size=size).module
    assert sum(p.numel() for p in module.parameters()) > 5e5
