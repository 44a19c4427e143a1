"""Preprocessing against Pillow and torchvision, which published judges were trained behind."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.rewards.pixels import MEAN, STD, Pixels, fit

from .tiny import images


def _noise(*shape):
    return torch.randint(64, 192, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("side", [512, 300, 96, 28])
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_the_resize_is_pillows_bicubic(side, kind):
    """Down and up; Pillow rounds to whole levels after each of its two passes, so half a level twice.

    It also cuts overshoot between them, so the noise keeps away from both ends.
    """
    x = ((images(1, height=side, width=side) + 1) * 127.5).round() if kind == "smooth" else _noise(1, 3, side, side)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy().astype(np.uint8))
    theirs = torch.from_numpy(np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    error = (fit(x, 224)[0].clamp(0, 255) - theirs.float()).abs()
    # weights of a bicubic pass add up to 1.3 in absolute value: 0.5 * 1.3 + 0.5
    assert error.max() <= 1.3
    assert error.mean() < 0.5


@pytest.mark.parametrize("shape", [(40, 24), (11, 16), (23, 16), (16, 25), (16, 16), (33, 57)])
def test_sizes_and_margins_are_torchvisions(shape):
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    x = _noise(2, 3, *shape)
    theirs = transforms.center_crop(
        transforms.resize(x, [16], transforms.InterpolationMode.BICUBIC, antialias=True), [16]
    )
    assert torch.allclose(fit(x, 16), theirs, atol=1e-3)


def test_images_of_the_right_size_are_left_alone():
    x = _noise(1, 3, 16, 16)
    assert torch.equal(fit(x, 16), x)


def test_pixels_are_standardised_from_minus_one_to_one():
    black, white = (Pixels(8)(torch.full((1, 3, 8, 8), value)) for value in (-1.0, 1.0))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(black[0] * std + mean, torch.zeros(3, 8, 8), atol=1e-6)
    assert torch.allclose(white[0] * std + mean, torch.ones(3, 8, 8), atol=1e-6)


def test_what_is_over_exposed_is_cut_and_has_no_gradient():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5]).view(1, 1, 2, 2).requires_grad_()
    Pixels(2)(x).sum().backward()
    slope = 0.5 * (1 / torch.tensor(STD)).sum()
    assert torch.allclose(x.grad.flatten(), torch.tensor([0, 1, 1, 0]) * slope)
    assert torch.equal(Pixels(2)(x), Pixels(2)(x.clamp(-1, 1)))


def test_the_mean_of_an_image_survives_the_resize():
    """Weights of every output pixel add up to 1: a constant image stays what it is, at any size."""
    for side in (7, 50, 224):
        assert torch.allclose(fit(torch.full((1, 1, side, side), 0.3), 32), torch.tensor(0.3), atol=1e-5)


def test_other_channels_are_refused():
    with pytest.raises(UserError, match="1 or 3 channels, not 2"):
        Pixels(8)(torch.zeros(1, 2, 8, 8))
