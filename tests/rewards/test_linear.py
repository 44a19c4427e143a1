"""R(x) = mean(direction * x): values and gradients in closed form."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.rewards.registry import make_reward

X = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("said", "factor"), [("brightness", 1.0), (0.25, 0.25), (-3, -3.0)])
def test_a_number_is_the_slope_of_the_mean(said, factor):
    """dR/dx = a / (C H W) at every pixel."""
    x = X.clone().requires_grad_()
    value = make_reward({"linear": {"direction": said}})(x)
    value.sum().backward()
    assert torch.allclose(value, factor * X.mean((1, 2, 3)), atol=1e-6)
    assert torch.allclose(x.grad, torch.full_like(X, factor / X[0].numel()))


def test_the_checkerboard_turns_its_sign_from_pixel_to_pixel():
    x = X.clone().requires_grad_()
    make_reward({"linear": {"direction": "checkerboard"}})(x).sum().backward()
    sign = x.grad * X[0].numel()
    assert torch.allclose(sign[..., 0, 0], torch.ones(3, 2))
    assert torch.allclose(sign[..., 1:, :], -sign[..., :-1, :])
    assert torch.allclose(sign[..., 1:], -sign[..., :-1])


def test_a_constant_image_has_no_checkerboard():
    value = make_reward({"linear": {"direction": "checkerboard"}})(torch.ones(2, 1, 8, 8))
    assert torch.equal(value, torch.zeros(2))


def test_rows_of_numbers_have_a_brightness_too():
    assert torch.allclose(make_reward("linear")(X[:, 0, 0]), X[:, 0, 0].mean(1))


def test_an_unknown_pattern_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"direction='chequerboard'.*did you mean 'checkerboard'"):
        make_reward({"linear": {"direction": "chequerboard"}})
