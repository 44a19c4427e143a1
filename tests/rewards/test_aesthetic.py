"""A linear head on normalised image features."""

import pytest
import torch
from safetensors.torch import save_file

from fewstep.errors import UserError
from fewstep.rewards.base import Asked
from fewstep.rewards.heads import LinearChain, chain_state, widths_of
from fewstep.rewards.registry import make_reward

from .tiny import PROMPTS, clip, images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    clip(place)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("again"))


def _made(folder, head, place, **more):
    save_file(head, place / "head.safetensors")
    return make_reward({"aesthetic": {"from": str(place / "head.safetensors"), "clip": str(folder), **more}})


def _features(model, reward, x):
    with torch.no_grad():
        f = model.visual_projection(model.vision_model(pixel_values=reward.pixels(x)).pooler_output)
    return f / f.norm(dim=-1, keepdim=True)


def test_one_linear_layer_on_the_direction_of_the_features(folder, model, tmp_path):
    head = {"weight": torch.randn(1, 8), "bias": torch.tensor([5.0])}
    reward, x = _made(folder, head, tmp_path), images()
    expected = _features(model, reward, x) @ head["weight"][0] + 5
    assert torch.allclose(reward(x), expected, atol=1e-5)
    assert torch.equal(reward(x), reward(x, Asked(PROMPTS)))  # prompts are not read
    assert expected.std() > 0.05


def test_a_chain_is_the_product_of_its_layers(folder, model, tmp_path):
    """The improved predictor's file: linear layers at places 0, 2, 3 with dropout between them."""
    w = {0: torch.randn(6, 8), 2: torch.randn(4, 6), 3: torch.randn(1, 4)}
    head = {f"layers.{n}.weight": t for n, t in w.items()} | {
        f"layers.{n}.bias": torch.zeros(len(t)) for n, t in w.items()
    }
    reward, x = _made(folder, head, tmp_path), images()
    assert torch.allclose(reward(x), _features(model, reward, x) @ (w[3] @ w[2] @ w[0])[0], atol=1e-5)


def test_the_text_tower_is_not_kept(folder, model, tmp_path):
    reward = _made(folder, {"weight": torch.ones(1, 8), "bias": torch.zeros(1)}, tmp_path)
    vision = sum(p.numel() for p in model.vision_model.parameters()) + model.visual_projection.weight.numel()
    assert sum(p.numel() for p in reward.parameters()) == vision + 9


def test_gradients_reach_the_image_and_autocast_keeps_float32(folder, tmp_path):
    head, x = {"weight": torch.randn(1, 8), "bias": torch.zeros(1)}, images().requires_grad_()
    reward = _made(folder, head, tmp_path, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        value = reward(x)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(p.grad is None for p in reward.parameters())


def test_layers_of_a_chain_keep_their_order_past_ten():
    """Places 9, 10, 11 in the order of numbers, not of letters."""
    widths = {9: (7, 6), 10: (6, 5), 11: (5, 1)}
    state = {f"mlp.layers.{n}.weight": torch.zeros(b, a) for n, (a, b) in widths.items()}
    state |= {f"mlp.layers.{n}.bias": torch.zeros(b) for n, (_, b) in widths.items()}
    assert widths_of(chain_state(state)) == [7, 6, 5, 1]


def test_a_head_for_other_features_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="the head reads 5 features, this CLIP gives 8"):
        _made(folder, {"weight": torch.ones(1, 5), "bias": torch.zeros(1)}, tmp_path)


def test_a_whole_clip_is_no_head(folder):
    with pytest.raises(UserError, match="holds no linear layers: give the head alone"):
        make_reward({"aesthetic": {"from": str(folder), "clip": str(folder)}})


def test_without_a_head_the_mend_is_told(folder):
    with pytest.raises(UserError, match=r"config\.reward\.aesthetic\.from: no weights are named: fetch them \(sa_0_4"):
        make_reward({"aesthetic": {"clip": str(folder)}})


def test_a_plan_counts_vit_l_and_the_head():
    """ViT-L/14: 24 blocks of width 1024, 257 places, two outer norms; a projection to 768; one linear layer."""
    with torch.device("meta"):
        reward = make_reward("aesthetic")
    width, grid = 1024, 16
    layers = 24 * (12 * width**2 + 13 * width)
    embeddings = width * (3 * 14 * 14 + 1 + grid * grid + 1)
    assert sum(p.numel() for p in reward.parameters()) == layers + embeddings + 4 * width + width * 768 + 769


def test_a_chain_of_linear_layers_is_affine():
    chain = LinearChain([8, 4, 2, 1])
    a, b = torch.randn(2, 5, 8)
    assert torch.allclose(chain(0.3 * a + 0.7 * b), 0.3 * chain(a) + 0.7 * chain(b), atol=1e-6)
