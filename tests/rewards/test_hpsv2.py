"""HPSv2 from weights under open_clip's names."""

import pytest
import torch
from safetensors.torch import save_file

from fewstep.errors import UserError
from fewstep.rewards.base import Asked
from fewstep.rewards.cosine import VIT_H_14
from fewstep.rewards.hpsv2 import HEADS
from fewstep.rewards.open_clip import sizes_of, to_transformers
from fewstep.rewards.registry import make_reward

from .tiny import PROMPTS, clip, clip_tokenizer, images, to_open_clip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One tiny model of ViT-H's kind (GELU, 16 heads), as a transformers folder and in open_clip's names."""
    theirs, ours = tmp_path_factory.mktemp("transformers"), tmp_path_factory.mktemp("open_clip")
    model = clip(theirs, act="gelu", heads=HEADS)
    save_file(to_open_clip(model.state_dict()), clip_tokenizer(ours) / "HPS_v2.1.safetensors")
    return theirs, ours


def test_there_and_back_every_weight_is_what_it_was(both, tmp_path):
    state = clip(tmp_path, act="gelu", heads=HEADS).state_dict()
    back = to_transformers(to_open_clip(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_open_clip_weights_give_the_reward_of_the_transformers_folder(both):
    values = [make_reward({"hpsv2": str(folder)})(images(), Asked(PROMPTS)) for folder in both]
    assert values[0].std() > 0.05
    assert torch.allclose(*values, atol=1e-6)


def test_a_file_serves_as_well_as_its_folder(both):
    file = both[1] / "HPS_v2.1.safetensors"
    assert torch.equal(
        make_reward({"hpsv2": str(file)})(images(), Asked(PROMPTS)),
        make_reward({"hpsv2": str(both[1])})(images(), Asked(PROMPTS)),
    )


def test_the_tokenizer_may_lie_elsewhere(both, tmp_path):
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((both[1] / "HPS_v2.1.safetensors").read_bytes())
    reward = make_reward({"hpsv2": {"from": str(alone), "tokenizer": str(both[0])}})
    assert torch.equal(reward(images(), Asked(PROMPTS)), make_reward({"hpsv2": str(both[1])})(images(), Asked(PROMPTS)))
    with pytest.raises(UserError, match=r"config\.reward\.hpsv2\.tokenizer: 'laion.*put that file beside the weights"):
        make_reward({"hpsv2": str(alone)})


def test_sizes_are_read_off_the_published_shapes():
    """From ViT-H/14's weights on the meta device come the sizes that are counted when there are no weights."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        state = CLIPModel(CLIPConfig.from_dict(VIT_H_14)).state_dict()
    said = CLIPConfig.from_dict(sizes_of(to_open_clip(state), HEADS)).to_dict()
    assert said == CLIPConfig.from_dict(VIT_H_14).to_dict()


def test_weights_of_something_else_are_refused(both, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"holds no ViT under open_clip's names: .*is missing"):
        make_reward({"hpsv2": str(tmp_path)})


def test_a_lost_weight_is_named(both, tmp_path):
    from safetensors.torch import load_file

    state = load_file(both[1] / "HPS_v2.1.safetensors")
    del state["visual.ln_post.bias"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"not the weights of this reward: Missing.*vision_model\.post_layernorm\.bias"):
        make_reward({"hpsv2": {"from": str(tmp_path), "tokenizer": str(both[0])}})


def test_a_plan_counts_vit_h_when_nothing_is_here():
    with torch.device("meta"):
        assert sum(p.numel() for p in make_reward("hpsv2").parameters()) == 986_109_441
