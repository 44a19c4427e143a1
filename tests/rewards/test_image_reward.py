"""ImageReward: its head's hinge, and its network from weights under its own names."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.rewards.base import Asked
from fewstep.rewards.blip import BlipScore, Sizes, to_transformers
from fewstep.rewards.image_reward import MEAN, STD, capped
from fewstep.rewards.registry import make_reward

from .tiny import PROMPTS, images, randomise

SIZES = Sizes(
    vision_width=32,
    vision_layers=2,
    vision_hidden=48,
    patch=8,
    image=16,
    text_width=24,
    text_layers=2,
    text_hidden=40,
    vocabulary=40,
    positions=50,
    head=(24, 16, 8, 4, 2, 1),
)
DROPOUTS_BETWEEN = (0, 2, 4, 6, 7)  # places of the linear layers in the published head


def _published(state):
    """A BlipScore's weights under ImageReward's names: the way there, written apart from the way back."""
    there = {
        "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
        "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    }
    words = {
        "vision.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
        "vision.post_layernorm": "blip.visual_encoder.norm",
        "vision.encoder.layers": "blip.visual_encoder.blocks",
        "layer_norm": "norm",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
    }
    out = {}
    for name, tensor in state.items():
        kind = name.split(".")[0]
        new = there.get(name, name)
        if kind == "vision" and name not in there:
            for ours, theirs in words.items():
                new = new.replace(ours, theirs)
        if kind == "text":
            new = f"blip.text_encoder.{name[5:]}"
        if kind == "head":
            layer, leaf = name.split(".")[2:]
            new = f"mlp.layers.{DROPOUTS_BETWEEN[int(layer)]}.{leaf}"
        out[new] = tensor.clone()
    return out | {"blip.temp": torch.tensor(0.07)}  # of BLIP's training, no part of the score


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = BlipScore(SIZES).eval()
    randomise(network)
    return network


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    place = tmp_path_factory.mktemp("image_reward")
    constants = {"blip.text_encoder.embeddings.position_ids": torch.arange(50)[None]}
    save_file(_published(network.state_dict()) | constants, place / "ImageReward.safetensors")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cat two dogs blue house by the sea"
    (place / "vocab.txt").write_text(words.replace(" ", "\n"))
    return place


def test_a_good_image_gains_nothing_and_a_poor_one_has_slope_one():
    """-relu(2 - r): r = 2.5 gives 0 and no gradient, r = 1 gives -1 and slope 1."""
    r = torch.tensor([2.5, 1.0, -3.0], requires_grad=True)
    value = capped(r, 2.0)
    value.sum().backward()
    assert value.tolist() == [0, -1, -5]
    assert r.grad.tolist() == [0, 1, 1]
    assert torch.equal(capped(r, None), r)


def test_there_and_back_every_weight_is_what_it_was(network):
    state = network.state_dict()
    back = to_transformers(_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert Sizes.of(_published(state)) == SIZES


def test_the_reward_is_the_networks_own_score(folder, network):
    """r = (head(first token) - mean) / std, with tokens padded to 35 and masked."""
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0], [2, 5, 10, 11, 3]])
    asked = Asked(["a red cat", "two dogs", "a blue house"])
    reward = make_reward({"image_reward": {"from": str(folder), "cap": None}})
    with torch.no_grad():
        raw = network(reward.pixels(images()), ids, (ids > 0).long())
    assert raw.std() > 0.05
    assert torch.allclose(reward(images(), asked), (raw - MEAN) / STD, atol=1e-5)
    assert torch.allclose(
        make_reward({"image_reward": str(folder)})(images(), asked), -(2 - (raw - MEAN) / STD).relu(), atol=1e-5
    )


def test_image_and_prompt_both_matter(folder):
    reward = make_reward({"image_reward": str(folder)})
    x = images()
    assert (reward(x, Asked(PROMPTS)) - reward(x, Asked(PROMPTS[::-1]))).abs()[[0, 2]].min() > 1e-3
    assert (reward(x, Asked(PROMPTS)) - reward(x.flip(3), Asked(PROMPTS))).abs().min() > 1e-4


def test_gradients_reach_the_image_until_the_cap(folder):
    x, asked = images().requires_grad_(), Asked(PROMPTS)
    poor, good = (make_reward({"image_reward": {"from": str(folder), "cap": cap}}) for cap in (100, -100))
    poor(x, asked).sum().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    x.grad = None
    value = good(x, asked)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(3))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert all(p.grad is None for p in poor.parameters())


def test_prompts_are_cut_at_35_tokens(folder):
    reward, x = make_reward({"image_reward": str(folder)}), images(1)
    long, cut = (reward(x, Asked(["red " * words])) for words in (60, 33))
    assert torch.equal(long, cut)
    assert not torch.equal(cut, reward(x, Asked(["red " * 20])))


def test_half_precision_keeps_the_head_in_float32(folder):
    half = make_reward({"image_reward": {"from": str(folder), "precision": "bf16"}})
    assert {p.dtype for p in half.network.head.parameters()} == {torch.float32}
    full = make_reward({"image_reward": str(folder)})(images(), Asked(PROMPTS))
    assert torch.allclose(half(images(), Asked(PROMPTS)), full, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = make_reward({"image_reward": str(folder)})(images(), Asked(PROMPTS))
    assert inside.dtype == torch.float32
    assert torch.allclose(inside, full, atol=0.1)


def test_a_plan_counts_the_published_network():
    """BLIP's ViT-L/16 with its position table, BERT base with cross-attention into 1024, and the head."""
    with torch.device("meta"):
        reward = make_reward("image_reward")
    vision = 24 * (12 * 1024**2 + 13 * 1024) + 1024 * (197 + 1 + 16 * 16 * 3 + 1 + 2)
    attention = 4 * (768**2 + 768) + 2 * 768
    cross = 2 * (768**2 + 768) + 2 * (768 * 1024 + 768) + 2 * 768
    feed = 2 * 768 * 3072 + 3072 + 768 + 2 * 768
    text = 12 * (attention + cross + feed) + 768 * (30524 + 512 + 2)
    head = 768 * 1024 + 1024 + 1024 * 128 + 128 + 128 * 64 + 64 + 64 * 16 + 16 + 16 + 1
    assert sum(p.numel() for p in reward.parameters()) == vision + text + head


def test_other_weights_are_refused_and_missing_ones_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"'THUDM/ImageReward' is neither here.*hf download.*image_reward\.from=FOLDER"):
        make_reward("image_reward")
    state = load_file(folder / "ImageReward.safetensors")
    lost = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    save_file({name: t for name, t in state.items() if name != lost}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"Missing key.*text\.encoder\.layer\.1\.crossattention\.self\.key\.bias"):
        make_reward({"image_reward": {"from": str(tmp_path), "tokenizer": str(folder)}})
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"holds no ImageReward: .*is missing"):
        make_reward({"image_reward": str(tmp_path)})
