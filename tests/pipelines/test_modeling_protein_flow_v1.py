"""ProteinFlowTransformer: padding, symmetry, conditions, sizes, and files."""

from __future__ import annotations

import torch
from fewstep_pipelines import ProteinaTransformer, ProteinFlowTransformer
from fewstep_pipelines.modeling_protein_flow_v1 import binned
from torch import Tensor

from fewstep.data.chains import rotations

from .proteins import protein_network


def inputs(rows: int = 2, residues: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """(x, tau, mask), whole chains of .4 nm steps."""
    steps = torch.randn(rows, residues, 3, generator=torch.Generator().manual_seed(0))
    x = (0.4 * steps / steps.norm(dim=2, keepdim=True)).cumsum(1)
    return x - x.mean(1, keepdim=True), torch.full((rows,), 0.6), torch.ones(rows, residues, dtype=torch.bool)


def test_a_new_network_answers_zero():
    """So a training run starts from the mean."""
    network = ProteinFlowTransformer(width=16, num_layers=1, num_heads=2, pair_width=8, cond_width=16)
    assert not network(*inputs()).any()


@torch.no_grad()
def test_padding_changes_nothing():
    """A padded row's answer is that of the chain alone, and 0 in padding."""
    network, (x, tau, mask) = protein_network(), inputs()
    alone = network(x[:1, :9] - x[:1, :9].mean(1, keepdim=True), tau[:1], mask[:1, :9])
    mask = mask.clone()
    mask[0, 9:] = False
    x = x.clone()
    x[0, :9] -= x[0, :9].mean(0)
    x[0, 9:] = 0
    together = network(x, tau, mask)
    torch.testing.assert_close(together[:1, :9], alone, atol=1e-5, rtol=1e-4)
    assert not together[0, 9:].any() and together[1].any(1).all()


@torch.no_grad()
def test_it_turns_with_the_chain_and_sees_handedness():
    """u(R x) = R u(x) for turns; for mirror images it is another answer. Proteina's network does not turn."""
    x, tau, mask = inputs()
    turn = rotations(torch.randn(1, 4, generator=torch.Generator().manual_seed(1)))[0]
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    network = protein_network()
    u = network(x, tau, mask)
    torch.testing.assert_close(network(x @ turn, tau, mask), u @ turn, atol=1e-4, rtol=1e-4)
    assert (network(x @ mirror, tau, mask) - u @ mirror).abs().max() > 1e-3
    torch.manual_seed(0)
    plain = ProteinaTransformer(16, 1, 2, 8, 1, 8, 8, 8, 16)
    torch.nn.init.normal_(plain.output.weight)
    assert (plain(x @ turn, tau, mask) - plain(x, tau, mask) @ turn).abs().max() > 1e-3


@torch.no_grad()
def test_rows_do_not_see_each_other():
    """A row's answer does not depend on its neighbours."""
    network, (x, tau, mask) = protein_network(), inputs()
    torch.testing.assert_close(network(x.flip(0), tau, mask).flip(0), network(x, tau, mask))


@torch.no_grad()
def test_what_else_the_network_is_told_changes_its_answer():
    """A predicted chain, chain breaks, fold labels; label 0 is the same as no label."""
    network, (x, tau, mask) = protein_network(cath_classes=(3, 4, 5)), inputs()
    u = network(x, tau, mask)
    broken = torch.zeros_like(mask)
    broken[:, 4] = True
    assert not torch.allclose(network(x, tau, mask, x_self=x), u)
    assert not torch.allclose(network(x, tau, mask, broken=broken), u)
    assert not torch.allclose(network(x, tau, mask, cath=torch.tensor([[1, 2, 3]] * 2)), u)
    assert torch.equal(network(x, tau, mask, cath=torch.zeros(2, 3, dtype=torch.long)), u)
    deaf = protein_network(self_conditioning=False)
    assert torch.equal(deaf(x, tau, mask, x_self=x), deaf(x, tau, mask))


def test_checkpointing_leaves_gradients_alone():
    """Blocks are run again in the backward pass, with the same result."""
    gradients = []
    for on in (False, True):
        network = protein_network().train()
        if on:
            network.enable_gradient_checkpointing()
        network(*inputs()).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


def test_distances_fall_into_bins_with_open_ends():
    """.1 to 3 nm; the first bin is what is nearer, the last what is farther."""
    x = torch.zeros(1, 4, 3)
    x[0, :, 0] = torch.tensor([0.0, 0.05, 1.0, 9.0])
    found = binned(x, 64)[0, 0]
    assert found[1] == 0 and found[3] == 63 and 0 < found[2] < 63


@torch.no_grad()
def test_a_saved_network_comes_back_with_its_code(tmp_path):
    """Equal answers; the file that defines it lies beside the weights."""
    network = protein_network()
    network.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_protein_flow_v1.py").is_file()
    again = ProteinFlowTransformer.from_pretrained(tmp_path)
    assert torch.equal(again(*inputs()), network(*inputs()))


@torch.no_grad()
def test_bfloat16_runs():
    """Within its precision."""
    network, (x, tau, mask) = protein_network(), inputs()
    u = network(x, tau, mask)
    half = network.to(torch.bfloat16)(x.bfloat16(), tau, mask)
    assert half.dtype == torch.bfloat16 and (half.float() - u).norm() < 0.1 * u.norm()
