"""The latent proxy reward model: its loss (RG-LCD, arXiv 2403.11027) and its towers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.paths import FlowPath
from fewstep.models.unet2d import UNET2D
from fewstep.nets.latent_reward import (
    WEIGHTS,
    ImageTower,
    LabelTower,
    LatentReward,
    PromptTower,
    ProxySpec,
    neighbours,
    preference_rows,
)
from fewstep.roles import Handle, Role, RoleSpec

SPEC = ProxySpec(width=16, depth=1, patch=4, embed=8)


def logits(seed: int, rows: int = 6) -> Tensor:
    """[3, rows] in float64: student's prediction, target, ground truth."""
    return torch.randn(3, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student(sizes: dict, classes: int | None = 10) -> Handle:
    """A tiny UNet as a role."""
    module = UNET2D.build(**{**sizes, "classes": classes}).module
    return Handle(Role("student"), module, RoleSpec(), "frozen", family="unet2d", path=FlowPath())


# the loss


def test_loss_is_the_sum_of_three_pairwise_divergences():
    """sum over (0,1), (0,2), (1,2) of sum_k p_k log(p_k / q_k), p and q softmax over the pair."""
    proxy, expert = logits(0), logits(1)
    expected = torch.zeros(6, dtype=torch.float64)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p, q = torch.softmax(expert[[i, j]], 0), torch.softmax(proxy[[i, j]], 0)
        expected += (p * (p / q).log()).sum(0)
    torch.testing.assert_close(preference_rows(proxy, expert), expected, rtol=1e-10, atol=1e-12)


def test_perfect_agreement_costs_nothing():
    """Property 7: KL 0 when the proxy's logits are the expert's."""
    assert preference_rows(logits(0), logits(0)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["kl", "cross_entropy"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_constant_a_caption_changes_nothing(kind, smooth):
    """Property 7: only differences of logits count; proxy and expert may be off by any number for each condition."""
    offset = 5 * torch.randn(6, dtype=torch.float64)
    plain = preference_rows(logits(0), logits(1), kind, smooth)
    torch.testing.assert_close(preference_rows(logits(0) + offset, logits(1) - offset, kind, smooth), plain)


def test_loss_is_positive_as_soon_as_one_difference_is_off():
    """Property 7: zero only where all three differences match."""
    expert = logits(1)
    for off in range(3):
        proxy = expert.clone()
        proxy[off] += 0.1
        assert (preference_rows(proxy, expert) > 1e-4).all()


@pytest.mark.parametrize("kind", ["kl", "cross_entropy"])
@pytest.mark.parametrize("smooth", [False, True])
def test_gradient_sums_to_zero_over_the_three_latents(kind, smooth):
    """Property 7: d L / d P is a redistribution: one rises by what the others fall."""
    proxy = logits(0).requires_grad_()
    (gradient,) = torch.autograd.grad(preference_rows(proxy, logits(1), kind, smooth).sum(), proxy)
    assert gradient.abs().max() > 0.05
    assert gradient.sum(0).abs().max() < 1e-12


def test_smoothed_truth_makes_a_pair_even_only_where_a_made_latent_wins():
    """smooth_gt_label: E_made > E_truth counts as (1/2, 1/2); all other pairs stay as they are."""
    expert = torch.tensor([[2.0, 0.0, 2.0], [1.0, 0.5, -1.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    proxy = torch.zeros(3, 3, dtype=torch.float64)

    def pair(i: int, j: int, row: int) -> float:
        p = torch.softmax(expert[[i, j], row], 0)
        return (p * (2 * p).log()).sum().item()

    smooth = preference_rows(proxy, expert, smooth_gt_label=True)
    # row 0: both made latents win over the truth; row 1: none; row 2: the student's alone
    expected = [pair(0, 1, 0), pair(0, 1, 1) + pair(0, 2, 1) + pair(1, 2, 1), pair(0, 1, 2) + pair(1, 2, 2)]
    assert smooth.tolist() == pytest.approx(expected, abs=1e-12)


def test_cross_entropy_aims_at_the_preferred_latent_of_each_pair_and_halves_ties():
    """-log softmax(P)_best over the pair, the arg-max taken over the two latents and not over the captions."""
    proxy = logits(0, rows=2)
    expert = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    log = {(i, j): torch.log_softmax(proxy[[i, j]], 0) for i, j in ((0, 1), (0, 2), (1, 2))}
    first = -(log[0, 1][0, 0] + log[0, 2][1, 0] + log[1, 2][1, 0])
    second = -(log[0, 1][:, 1].mean() + log[0, 2][1, 1] + log[1, 2][1, 1])
    torch.testing.assert_close(preference_rows(proxy, expert, "cross_entropy"), torch.stack([first, second]))


@pytest.mark.parametrize("rows, order", [(4, [1, 0, 3, 2]), (3, [1, 0, 2]), (1, [0])])
def test_neighbours_change_places_within_pairs(rows, order):
    """So a batch cut into micro-batches of even size has the same neighbours."""
    x = torch.arange(rows)
    assert neighbours(x).tolist() == order
    assert rows % 2 or torch.cat([neighbours(part) for part in x.split(2)]).tolist() == order


def test_a_fourth_latent_adds_its_three_pairs():
    """The neighbour's true latent is ranked below each of the other three."""
    proxy, expert = logits(0), logits(1)
    four = [torch.cat([part, torch.full((1, 6), -2.0, dtype=torch.float64)]) for part in (proxy, expert)]
    pairs = [preference_rows(*(part[[i, 3, 3]] for part in four)) / 2 for i in range(3)]  # (i, 3) twice, (3, 3) is 0
    torch.testing.assert_close(preference_rows(*four), preference_rows(proxy, expert) + sum(pairs))


def test_training_on_preferences_recovers_the_expert_s_differences():
    """Free logits under gradient descent end at the expert's differences."""
    expert, proxy = logits(1), torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([proxy], 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        preference_rows(proxy, expert).sum().backward()
        optimizer.step()
    torch.testing.assert_close(proxy[0] - proxy[2], expert[0] - expert[2], rtol=0, atol=1e-3)
    torch.testing.assert_close(proxy[1] - proxy[2], expert[1] - expert[2], rtol=0, atol=1e-3)


# the network


def test_rows_are_paired_with_their_own_condition(tiny_unet):
    """Cosine [k, r] belongs to latent k * rows + r and to condition r, and to nothing else in the batch."""
    torch.manual_seed(0)
    proxy = LatentReward.reading(student(tiny_unet), SPEC)
    latents, cond = torch.randn(3 * 4, 1, 8, 8), Cond(label=torch.tensor([7, 1, 1, 4]))
    cosines, scale = proxy(latents, cond)
    assert cosines.shape == (3, 4) and cosines.abs().max() <= 1
    assert scale.item() == pytest.approx(1 / 0.07)
    for k, r in ((0, 0), (1, 3), (2, 1)):
        alone, _ = proxy(latents[4 * k + r][None], cond[r : r + 1])
        torch.testing.assert_close(alone[0, 0], cosines[k, r])


def test_scale_stays_below_a_hundred():
    proxy = LatentReward(nn.Flatten(), LabelTower(2, 4))
    proxy.log_scale.data.fill_(10.0)
    assert proxy(torch.randn(2, 4), Cond(label=torch.tensor([0, 1])))[1].item() == 100.0


def test_prompt_tower_sees_every_token():
    """One query attends over all text states of a row, and over no other row's."""
    torch.manual_seed(0)
    tower = PromptTower(states=12, width=16, embed=8)
    words = torch.randn(2, 5, 12)
    plain = tower(Cond(prompt_embeds=words))
    assert plain.shape == (2, 8)
    for token in range(5):
        other = words.clone()
        other[0, token] = torch.randn(12)
        moved = (tower(Cond(prompt_embeds=other)) - plain).abs().amax(1)
        assert moved[0] > 1e-4 and moved[1] < 1e-6


def test_image_tower_knows_where_a_patch_is():
    """Learnt places: the same patches in another order are another image."""
    torch.manual_seed(0)
    tower = ImageTower((1, 8, 8), SPEC)
    latents = torch.randn(1, 1, 8, 8)
    assert (tower(latents) - tower(latents.roll(4, -1))).abs().max() > 1e-4


def test_towers_stay_in_float32_where_it_counts():
    """Under bfloat16 autocast the cosine is float32 and within bfloat16's error of the exact one, not quantised to it."""
    torch.manual_seed(0)
    proxy = LatentReward(nn.Identity(), LabelTower(4, 512))
    latents, cond = torch.randn(4, 512), Cond(label=torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        cosines, _ = proxy(latents, cond)
    torch.testing.assert_close(cosines, proxy(latents, cond)[0], rtol=1e-6, atol=1e-7)


# from a student and from a folder


def test_a_checkpoint_s_proxy_is_read_back(tiny_unet, tmp_path: Path):
    """proxy.from: the folder in which a run saved its role `proxy`."""
    torch.manual_seed(0)
    first = LatentReward.reading(student(tiny_unet), SPEC)
    save_file(first.state_dict(), tmp_path / WEIGHTS)
    torch.manual_seed(1)
    second = LatentReward.reading(student(tiny_unet), SPEC.model_copy(update={"source": str(tmp_path)}))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_planning_needs_sizes_and_no_weights(tiny_unet):
    """On the meta device the parameters are counted, and `from` is not opened."""
    with torch.device("meta"):
        proxy = LatentReward.reading(student(tiny_unet), SPEC.model_copy(update={"source": "nowhere"}))
    assert proxy.log_scale.is_meta and sum(p.numel() for p in proxy.parameters()) > 1000


@pytest.mark.parametrize(
    "changes, classes, message",
    [
        ({"patch": 3}, 10, "patch=3 does not divide"),
        ({"width": 100}, 10, "width=100: above 64"),
        ({"source": "nowhere"}, 10, "no 'nowhere/proxy.role.safetensors'"),
        ({}, None, "mode: proxy ranks images .* takes neither"),
    ],
)
def test_mistakes_are_named(tiny_unet, changes, classes, message):
    with pytest.raises(UserError, match=message):
        LatentReward.reading(student(tiny_unet, classes), SPEC.model_copy(update=changes))


def test_other_sizes_are_named(tiny_unet, tmp_path: Path):
    """Weights of another width, and latents of another size."""
    save_file(LatentReward.reading(student(tiny_unet), SPEC).state_dict(), tmp_path / WEIGHTS)
    wider = SPEC.model_copy(update={"width": 32, "source": str(tmp_path)})
    with pytest.raises(UserError, match="has other sizes"):
        LatentReward.reading(student(tiny_unet), wider)
    with pytest.raises(UserError, match=r"reads latents of \(1, 8, 8\) and got \(1, 4, 4\)"):
        ImageTower((1, 8, 8), SPEC)(torch.zeros(1, 1, 4, 4))
