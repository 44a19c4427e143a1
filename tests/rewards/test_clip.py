"""The cosine rewards against transformers' own cosine on its own preprocessing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizer

from fewstep.errors import UserError
from fewstep.rewards.base import Asked
from fewstep.rewards.clip import OPENAI, clip_of
from fewstep.rewards.cosine import VIT_H_14, VIT_L_14, cosine
from fewstep.rewards.registry import make_reward

from .tiny import PROMPTS, clip, clip_tokenizer, images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    clip(place)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("again"))


def _theirs(model, folder, x):
    """transformers' cosine of saved pictures and prompts."""
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy().astype(np.uint8)) for p in ((x + 1) * 127.5).round()]
    tokens = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding=True, return_tensors="pt", truncation=True, max_length=20
    )
    with torch.no_grad():
        out = model(pixel_values=processor(pictures, return_tensors="pt")["pixel_values"], **tokens)
    return (out.image_embeds * out.text_embeds).sum(-1)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
@pytest.mark.parametrize("sides", [(24, 24), (36, 24), (8, 12)])
def test_the_reward_is_transformers_cosine_on_its_own_preprocessing(folder, model, name, sides):
    x = images(height=sides[0], width=sides[1])
    ours, theirs = make_reward({name: {"from": str(folder)}})(x, Asked(PROMPTS)), _theirs(model, folder, x)
    assert theirs.std() > 0.05  # the images differ for it, so agreement means something
    # they round to whole grey levels behind the resize, we do not; odd margins are cut as torchvision does, see test_pixels
    assert torch.allclose(ours, theirs, atol=1e-2)


def test_at_the_judges_own_size_both_agree_to_rounding(folder, model):
    x = images(height=16, width=16)
    ours = make_reward({"clip": str(folder)})(x, Asked(PROMPTS))
    assert torch.allclose(ours, _theirs(model, folder, x), atol=1e-5)


def test_gradients_reach_the_image_and_not_the_judge(folder):
    reward, x = make_reward({"clip": str(folder)}), images().requires_grad_()
    reward(x, Asked(PROMPTS)).sum().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad or p.grad is not None for p in reward.parameters())


def test_the_gradient_is_the_slope_along_a_direction(folder):
    reward, x = make_reward({"clip": str(folder)}).double(), images().requires_grad_()
    direction, h = images(seed=5) * 0.5, 1e-2
    reward(x, Asked(PROMPTS)).sum().backward()
    inside = (x.detach().abs() < 1 - h).float()
    up, down = (reward(x.detach() + s * h * direction * inside, Asked(PROMPTS)).sum() for s in (1, -1))
    assert ((up - down) / (2 * h)).item() == pytest.approx((x.grad * direction * inside).sum().item(), rel=2e-2)


def test_a_sum_over_one_row_equals_that_row_alone(folder):
    reward, x, asked = make_reward({"clip": str(folder)}), images(), Asked(PROMPTS)
    assert torch.allclose(reward(x, asked)[1:2], reward(x[1:2], asked[1:2]), atol=1e-6)


def test_grey_images_are_seen_as_three_equal_channels(folder):
    reward, x = make_reward({"clip": str(folder)}), images(channels=1)
    assert torch.equal(reward(x, Asked(PROMPTS)), reward(x.repeat(1, 3, 1, 1), Asked(PROMPTS)))


def test_long_prompts_are_cut_and_not_dropped(folder):
    reward, x = make_reward({"clip": str(folder)}), images(rows=1)
    start = "abcdefghijklmnopqr"  # 18 letters and two ends fill the encoder's 20 places
    long, cut, other = (reward(x, Asked([p])) for p in (start + "x" * 200, start + "x", "b" + start))
    assert torch.equal(long, cut)
    assert not torch.equal(cut, other)


def test_autocast_keeps_the_cosine_in_float32(folder):
    """bf16 has steps of 1/512 at 0.3; the float32 dot product of bf16 features keeps finer ones, |cos(f, f)| = 1."""
    a = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        self_cosine, value = cosine(a, a), make_reward({"clip": str(folder)})(images(), Asked(PROMPTS))
    assert value.dtype == self_cosine.dtype == torch.float32
    assert (self_cosine - 1).abs().max() < 1e-6
    assert not torch.equal(value, value.bfloat16().float())
    assert torch.allclose(value, make_reward({"clip": str(folder)})(images(), Asked(PROMPTS)), atol=3e-2)


def test_weights_may_be_held_in_bf16(folder):
    half, full = (make_reward({"clip": {"from": str(folder), "precision": p}}) for p in ("bf16", "fp32"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.allclose(half(images(), Asked(PROMPTS)), full(images(), Asked(PROMPTS)), atol=3e-2)


def test_a_logit_is_the_scale_times_the_reward(folder, model):
    assert make_reward({"clip": str(folder)}).logit_scale == pytest.approx(
        math.exp(model.config.logit_scale_init_value)
    )


class _Encoder(torch.nn.Module):
    """The interface of clip-anytorch around a CLIPModel."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.visual, self.logit_scale = model, torch.nn.Module(), model.logit_scale
        self.visual.conv1, self.visual.input_resolution = model.vision_model.embeddings.patch_embedding, 16

    def encode_image(self, pixels):
        return self.inner.visual_projection(self.inner.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(self, ids):
        return self.inner.text_projection(self.inner.text_model(input_ids=ids).pooler_output)


def test_a_clip_object_made_elsewhere_gives_the_same_reward(folder, model):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    reward = clip_of(_Encoder(model), lambda p: tokenizer(p, padding=True, return_tensors="pt")["input_ids"])
    x = images()
    assert torch.allclose(reward(x, Asked(PROMPTS)), make_reward({"clip": str(folder)})(x, Asked(PROMPTS)), atol=1e-6)
    assert not any(p.requires_grad for p in reward.parameters())


def test_openai_names_mean_their_safetensors_on_the_hub():
    with pytest.raises(UserError, match=r"config\.reward\.clip\.from: 'openai/clip-vit-base-patch32' is neither here"):
        make_reward({"clip": "ViT-B/32"})
    assert len(OPENAI) == 4


def test_published_sizes_are_counted_without_weights():
    """ViT-H/14 has 986,109,441 parameters and ViT-L/14 427,616,513."""
    with torch.device("meta"):
        reward = make_reward("pickscore")
    assert sum(p.numel() for p in reward.parameters()) == 986_109_441
    assert {p.device.type for p in reward.parameters()} == {"meta"}
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        small = CLIPModel(CLIPConfig.from_dict(VIT_L_14))
    assert sum(p.numel() for p in small.parameters()) == 427_616_513
    assert VIT_H_14["vision_config"]["hidden_size"] == 16 * 80


def test_a_plan_counts_the_folder_that_is_there(folder, model):
    with torch.device("meta"):
        reward = make_reward({"clip": {"from": str(folder), "precision": "bf16"}})
    assert sum(p.numel() for p in reward.parameters()) == sum(p.numel() for p in model.parameters())
    assert {(p.device.type, p.dtype) for p in reward.parameters()} == {("meta", torch.bfloat16)}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    model = clip(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="has no tokenizer: copy"):
        make_reward({"clip": str(tmp_path)})
    clip_tokenizer(tmp_path)
    assert make_reward({"clip": str(tmp_path)}).towers.size == model.config.vision_config.image_size


def test_pictures_of_other_channels_are_refused(folder):
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        make_reward({"clip": str(folder)})(images(channels=4), Asked(PROMPTS))
