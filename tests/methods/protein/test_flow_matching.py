"""The teacher of chains: levels, self-conditioning, hidden fold labels, and distances told from features."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fewstep.data.batch import Cond
from fewstep.methods.protein.flow_matching import ProteinFlowMatching
from fewstep.nets.distogram import BINS, distogram_rows
from fewstep.recipe import load_recipe

from .networks import assembled, chains, draw

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
OFF = {"distogram": 0.0}


def test_noise_levels_have_the_law_of_the_paper():
    """1 - t of .98 Beta(1.9, 1) + .02 U: mean and the share below a half."""
    tau = 1 - assembled(ProteinFlowMatching, weights=OFF).times(draw(rows=40_000))
    assert tau.mean().item() == pytest.approx(0.98 * 1.9 / 2.9 + 0.02 / 2, abs=0.005)
    assert (tau < 0.5).float().mean().item() == pytest.approx(0.98 * 0.5**1.9 + 0.02 / 2, abs=0.01)


def test_the_loss_is_the_mean_square_error_of_the_velocity_over_residues():
    """Of a network that answers 0: |eps - x0|^2, with centred noise and without padding."""
    method, batch = assembled(ProteinFlowMatching, weights=OFF, self_conditioning=0.0), chains()
    for p in method.student.handle.module.parameters():
        p.data.zero_()
    update = next(iter(method.train_step(batch, draw(rows=4))))
    mask = batch.cond["mask"][..., None]
    eps = draw(rows=4).normal("eps", *batch.x0.shape[1:]) * mask
    eps = (eps - eps.sum(1, keepdim=True) / mask.sum(1, keepdim=True)) * mask
    expected = ((eps - batch.x0) ** 2).sum((1, 2)) / (3 * mask.sum((1, 2)))
    torch.testing.assert_close(update.losses["denoise"], expected)


def test_in_half_of_the_steps_the_network_is_told_its_own_prediction_without_gradient():
    """Once more called, and the prediction is no part of the graph."""
    method, told = assembled(ProteinFlowMatching, build={"self_conditioning": True}, weights=OFF), []
    plain = method.student.handle.module.forward

    def forward(*args, **said):
        told.append(said.get("x_self"))
        return plain(*args, **said)

    method.student.handle.module.forward = forward
    with_self = 0
    for step in range(40):
        told.clear()
        next(iter(method.train_step(chains(1), draw(step, rows=1))))
        assert [x is not None for x in told] in ([False], [False, True])
        if len(told) == 2:
            assert told[1] is not None and not told[1].requires_grad and told[1].any()
            with_self += 1
    assert 10 <= with_self <= 30


def test_levels_of_a_fold_label_are_hidden_from_the_finest_on():
    """T with .5, of those A with .5, of those C with .5; a coarser level is never hidden before a finer one."""
    method = assembled(ProteinFlowMatching, weights=OFF)
    cath = method.hidden(Cond(cath=torch.tensor([[1, 2, 3]]).expand(20_000, 3)), draw(rows=20_000))["cath"]
    hidden = cath == 0
    assert hidden.float().mean(0).tolist() == pytest.approx([0.125, 0.25, 0.5], abs=0.01)
    assert not (hidden[:, 0] & ~hidden[:, 1]).any() and not (hidden[:, 1] & ~hidden[:, 2]).any()


def test_the_distogram_is_the_cross_entropy_of_distances():
    """Sure of the right bins: 0; knowing nothing: log 64; padding and residues themselves do not count."""
    x0 = torch.zeros(1, 4, 3)
    x0[0, :, 0] = torch.tensor([0.0, 0.38, 0.76, 5.0])
    mask = torch.tensor([[True, True, True, False]])
    edges = torch.linspace(0, 1, BINS)[1:]
    sure = 1e4 * torch.nn.functional.one_hot(torch.bucketize(torch.cdist(x0, x0), edges), BINS).float()
    assert distogram_rows(sure, x0, mask).item() == pytest.approx(0, abs=1e-6)
    assert distogram_rows(torch.zeros_like(sure), x0, mask).item() == pytest.approx(math.log(BINS))
    sure[0, 3] = sure[0, :, 3] = 0.0
    assert distogram_rows(sure, x0, mask).item() == pytest.approx(0, abs=1e-6)


def test_distances_are_told_at_low_noise_alone_and_cost_nothing_when_off():
    """Rows of t >= .7 have no distogram loss; of weight 0 there is no head."""
    method, batch = assembled(ProteinFlowMatching, self_conditioning=0.0), chains(16)
    update = next(iter(method.train_step(batch, draw(rows=16))))
    t = update.levels["denoise"].t
    assert ((update.losses["distogram"] > 0) == (t < 0.7)).all() and 0 < (t < 0.7).sum() < 16
    assert update.role_names == ("student", "distogram")
    assert [role.name for role in assembled(ProteinFlowMatching, weights=OFF).roles()] == ["student"]


def test_the_samplers_levels_are_logarithmic_and_end_at_data():
    """1 - t = 1 - 10^(-2 k / N), stretched so that the first is noise; N levels."""
    schedule = assembled(ProteinFlowMatching, weights=OFF, steps=100).schedule()
    path = assembled(ProteinFlowMatching, weights=OFF).student.path
    t = [path.time(u) for u in schedule.u]
    assert (schedule.kind, len(t), t[0]) == ("sde", 100, pytest.approx(1.0, abs=1e-4))
    assert t[50] == pytest.approx((0.1 - 0.01) / 0.99) and t[-1] > 0


def test_the_recipe_is_sound():
    """As the page has it."""
    recipe = load_recipe(CONFIGS / "protein_flow_matching" / "chains.yaml")
    assert recipe.build_method().config.renewal == 0.5
