"""log p(label | image) under a shipped classifier, on real digits and garments."""

import pytest
import torch

from fewstep.data.registry import make_source
from fewstep.errors import UserError
from fewstep.nets.small_cnn import SmallCNN
from fewstep.rewards.base import Asked
from fewstep.rewards.registry import make_reward


def _real(source, n, **more):
    made = make_source({"source": source, **more})
    rows = made.fetch(torch.arange(len(made))[-n:], None)
    return rows["x0"], rows["cond"]["label"]


@pytest.fixture(scope="module")
def digits():
    return _real("digits", 500)  # which the classifier was not trained on


def test_right_labels_are_far_above_wrong_ones(digits):
    x, y = digits
    reward = make_reward("classifier")
    right, wrong = reward(x, Asked(labels=y)).mean(), reward(x, Asked(labels=(y + 1) % 10)).mean()
    assert right > -0.2
    assert wrong < -5


def test_the_highest_reward_is_where_the_classifier_is_right(digits):
    x, y = digits
    reward = make_reward("classifier")
    table = torch.stack([reward(x, Asked(labels=torch.full_like(y, label))) for label in range(10)], 1)
    assert torch.allclose(table.exp().sum(1), torch.ones(len(x)), atol=1e-5)
    assert torch.equal(table.argmax(1), SmallCNN.shipped("digits-cnn")(x).argmax(1))
    assert (table.argmax(1) == y).float().mean() > 0.95


def test_garments_have_their_own_classifier():
    x, y = _real("fashion_mnist", 300, split="test", size=16)
    reward = make_reward({"classifier": {"features": "fashion-cnn"}})
    assert reward(x, Asked(labels=y)).mean() > -0.7
    assert reward(x, Asked(labels=(y + 5) % 10)).mean() < -3


def test_climbing_the_reward_turns_one_digit_into_another(digits):
    """A few gradient steps on the image raise log p of the asked label: the graph to the image is whole."""
    x, asked = digits[0][:8].clone().requires_grad_(), Asked(labels=(digits[1][:8] + 1) % 10)
    reward = make_reward("classifier")
    before = reward(x, asked).detach()
    for _ in range(10):
        (gradient,) = torch.autograd.grad(reward(x, asked).sum(), x)
        x = (x + 0.2 * gradient.sign()).clamp(-1, 1).detach().requires_grad_()
    assert (reward(x, asked).detach() > before + 3).all()
    assert all(p.grad is None for p in reward.parameters())


def test_autocast_changes_no_bit(digits):
    x, asked = digits[0][:16], Asked(labels=digits[1][:16])
    reward = make_reward("classifier")
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward(x, asked)
    assert torch.equal(inside, reward(x, asked))


def test_other_channels_are_refused():
    with pytest.raises(UserError, match=r"digits-cnn sees 1 channel\(s\), the images have 3"):
        make_reward("classifier")(torch.zeros(1, 3, 8, 8), Asked(labels=torch.zeros(1, dtype=torch.long)))


def test_a_plan_counts_the_classifier_without_loading_it():
    with torch.device("meta"):
        reward = make_reward("classifier")
    assert {p.device.type for p in reward.parameters()} == {"meta"}
    assert sum(p.numel() for p in reward.parameters()) == sum(p.numel() for p in make_reward("classifier").parameters())
