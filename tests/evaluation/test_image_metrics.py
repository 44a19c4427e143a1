"""Metrics with a value an image: what each makes of the reward it is read with."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.image_metrics import IMAGE_METRICS
from fewstep.rewards.base import Asked
from fewstep.rewards.registry import make_reward
from tests.rewards.test_image_reward import folder, network  # noqa: F401  (a tiny ImageReward under its own names)
from tests.rewards.tiny import PROMPTS, clip

_IMAGES = torch.randint(0, 256, (len(PROMPTS), 3, 24, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def _values(name, **options):
    return IMAGE_METRICS.get(name)(options).values(_IMAGES, PROMPTS, None)


def _reward(said):
    return make_reward(said)(_IMAGES.float() / 127.5 - 1, Asked(PROMPTS))


def test_hpsv2_is_reported_times_a_hundred_and_pickscore_as_it_is(tmp_path):
    clip(tmp_path)
    place = str(tmp_path)
    assert torch.allclose(_values("hpsv2", **{"from": place}), 100 * _reward({"hpsv2": place}), atol=1e-4)
    assert torch.allclose(_values("pickscore", **{"from": place}), _reward({"pickscore": place}), atol=1e-6)
    assert IMAGE_METRICS.get("hpsv2")({"from": place}).chunk == 80


def test_image_reward_is_the_score_itself_without_the_cap_of_training(folder):  # noqa: F811
    judge = make_reward({"image_reward": {"from": str(folder)}})
    x = _IMAGES.float() / 127.5 - 1
    assert torch.allclose(
        _values("image_reward", **{"from": str(folder)}), judge.standing(x, Asked(PROMPTS)), atol=1e-6
    )
    assert (judge(x, Asked(PROMPTS)) <= 0).all()


def test_an_instrument_is_told_by_its_weights(tmp_path):
    clip(tmp_path / "a")
    clip(tmp_path / "b", seed=1)
    tools = [IMAGE_METRICS.get("hpsv2")({"from": str(tmp_path / x)}).tool for x in "aab"]
    assert tools[0] == tools[1] and tools[0].sha256 != tools[2].sha256
    assert tools[0].name == tools[2].name == "hpsv2"  # folders are no part of it


@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "pickscore", "aesthetic"])
def test_missing_weights_are_named_with_how_to_get_them_and_the_protocols_own_key(name):
    with pytest.raises(UserError, match=rf"^metrics\.{name}\.\w+: .*fetch them \(.*set metrics\.{name}\."):
        IMAGE_METRICS.get(name)({})


def test_a_wrong_option_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"metrics\.hpsv2: unknown key 'form': did you mean 'from'"):
        IMAGE_METRICS.get("hpsv2")({"form": "x"})
