"""Discriminator heads: shapes they read, and that each can tell two sets apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.errors import UserError
from fewstep.maths.losses import discriminator_rows
from fewstep.models.denoiser import Denoiser
from fewstep.nets.discriminator import Discriminator
from fewstep.roles import Role, RoleSpec, assemble

SHAPES = [(16, 4, 4), (8, 2, 2), (8, 16, 16), (20, 5, 7), (16, 12), (9, 6), (4, 32), (32,)]


@pytest.mark.parametrize("kind", ["conv", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_logit_a_row_which_depends_on_that_row_alone(shape, kind):
    """Maps, tokens and vectors of several sizes; heads normalise within rows."""
    torch.manual_seed(0)
    heads, x = Discriminator([shape], kind), torch.randn(5, *shape)
    logits = heads([x])
    assert logits.shape == (5,)
    torch.testing.assert_close(heads([x[1:3]]), logits[1:3])
    assert logits.std() > 1e-3  # small groups must not normalise everything away


@pytest.mark.parametrize("shape", [(16, 4, 4), (16, 12), (32,)])
def test_heads_learn_to_tell_two_sets_apart(shape):
    """softplus(-real) + softplus(fake) from 2 log 2 to below 0.5 where a random direction separates the sets."""
    torch.manual_seed(0)
    heads, shift = Discriminator([shape]), torch.randn(*shape)
    optimizer = torch.optim.Adam(heads.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        real, made = torch.randn(32, *shape) + shift, torch.randn(32, *shape)
        loss = discriminator_rows(heads([real]), heads([made])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2 * np.log(2), abs=0.4) and np.mean(losses[-5:]) < 0.5


def test_wide_maps_are_halved_down_to_four():
    """DMD2's head: one stride-2 convolution an octave, then one of 4x4, then the logit."""
    kernels = [m.kernel_size[0] for m in Discriminator([(8, 32, 32)]).modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels == [4, 4, 4, 4, 1]


def test_several_features_give_the_mean_of_their_logits():
    torch.manual_seed(0)
    heads = Discriminator([(8, 4, 4), (12,)])
    a, b = torch.randn(3, 8, 4, 4), torch.randn(3, 12)
    single = torch.stack([heads.heads[0](a).flatten(1).mean(1), heads.heads[1](b).flatten(1).mean(1)])
    torch.testing.assert_close(heads([a, b]), single.mean(0))


def test_tokens_that_are_no_square_are_refused():
    with pytest.raises(UserError, match="7 tokens are no square"):
        Discriminator([(7, 8)])


@pytest.mark.parametrize("shape, places", [((6, 3, 5), (2, 3)), ((7, 6), (1,)), ((6,), ())])
def test_a_mean_head_is_linear_in_the_mean_over_places(shape, places):
    """w . mean(h) + b, of the channels of a map or the width of tokens (any number of them)."""
    heads, x = Discriminator([shape], "mean"), torch.randn(4, *shape)
    head = heads.heads[0]
    pooled = x.mean(places) if places else x
    torch.testing.assert_close(heads([x]), (pooled @ head.linear.weight.T)[:, 0] + head.linear.bias)
    assert sum(p.numel() for p in heads.parameters()) == 7


def test_another_kind_of_heads_is_refused():
    with pytest.raises(UserError, match="unknown discriminator heads 'means': did you mean 'mean'"):
        Discriminator([(8,)], "means")


@pytest.mark.parametrize("layers, maps", [(None, 1), (("mid_block", "down_blocks.0"), 2)])
def test_heads_are_sized_by_asking_the_network(tiny_unet, layers, maps):
    """`reading` calls the denoiser once; default is the family's deepest layer."""
    specs = {"teacher": RoleSpec(**{"from": "unet2d", "build": tiny_unet})}
    teacher = Denoiser.of(assemble([Role("teacher")], specs, seed=0)["teacher"])
    heads = Discriminator.reading(teacher, layers)
    assert len(heads.heads) == maps
    cond = teacher.null(_labels(3))
    assert heads(teacher.features(torch.randn(3, 1, 8, 8), torch.rand(3), cond, layers)).shape == (3,)


@pytest.mark.parametrize("family, width", [("stable_diffusion", 16), ("stable_diffusion_xl", 16), ("mlp", 64)])
def test_heads_need_no_text_encoder_to_be_sized(family, width):
    """Networks with prompts are asked with a blank condition; nothing around them is loaded."""
    handle = assemble([Role("teacher")], {"teacher": RoleSpec(**{"from": family})}, seed=0)["teacher"]
    heads = Discriminator.reading(Denoiser.of(handle), None, "mean")
    assert heads.heads[0].linear.in_features == width


def _labels(rows: int):
    from fewstep.data.batch import Cond

    return Cond(label=torch.zeros(rows, dtype=torch.long))
