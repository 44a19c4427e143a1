"""The resize chains: each equals the package it is named for, pixel by pixel, and none equals another."""

import numpy as np
import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.resize import CHAINS, axis_weights, resized

SIZES = [(32, 32), (299, 299), (512, 77), (1024, 256), (300, 298), (1, 8)]


def _images(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator).to(torch.uint8)


def _pixels(images, chain):
    """The chain's result before it is normalised."""
    return resized(images, chain) * CHAINS[chain].spread + CHAINS[chain].centre


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_first_chain_is_torch_fidelitys(height, width):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = _images(height, width)
    resize = theirs.interpolate_bilinear_2d_like_tensorflow1x
    expected = (resize(images.float(), size=(299, 299), align_corners=False) - 128) / 128
    assert torch.allclose(resized(images, "torch-fidelity"), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("chain", "mode", "error"), [("clean", "clean", 2e-4), ("legacy", "legacy_pytorch", 2e-2)])
def test_the_other_chains_are_clean_fids_on_pixels_of_0_to_255(chain, mode, error, height, width):
    """PIL holds its weights in float64, PyTorch in float32, whose positions are off by 1e-5 of a pixel."""
    theirs = pytest.importorskip("cleanfid.resize").build_resizer(mode)
    images = _images(height, width)
    expected = theirs(images[0].permute(1, 2, 0).numpy())
    assert np.abs(_pixels(images, chain)[0].permute(1, 2, 0).numpy() - expected).max() < error


@pytest.mark.parametrize("chain", CHAINS)
def test_flat_images_stay_flat_and_nothing_leaves_the_range(chain):
    flat = torch.full((1, 1, 40, 30), 200, dtype=torch.uint8)
    assert torch.allclose(_pixels(flat, chain), torch.tensor(200.0), atol=1e-3)
    edges = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    edges[..., 32:] = 255  # bicubic overshoots on either side
    assert _pixels(edges, chain).aminmax() == (0, 255)


@pytest.mark.parametrize("chain", CHAINS)
def test_an_image_of_299_pixels_is_left_as_it_is(chain):
    assert torch.equal(axis_weights(chain, 299), torch.eye(299))


def test_only_clean_takes_the_mean_of_a_pattern_too_fine_for_299_pixels():
    """Stripes of one pixel at 1024: without antialiasing they come back as coarse, false ones."""
    stripes = (torch.arange(1024) % 2 * 255).to(torch.uint8).expand(1, 1, 1024, 1024)
    left = {chain: _pixels(stripes, chain)[..., 20:-20].std().item() for chain in CHAINS}
    assert left["clean"] < 1
    assert min(left["torch-fidelity"], left["legacy"]) > 50


def test_the_corner_grid_is_shifted_against_that_of_pixel_centres():
    ramp = torch.arange(0, 256, 4).to(torch.uint8).expand(1, 1, 64, 64)  # 4 levels a pixel
    corner, centre = (_pixels(ramp, chain)[0, 0, 0, 150].item() for chain in ("torch-fidelity", "legacy"))
    assert corner == pytest.approx(4 * 150 * 64 / 299, abs=1e-3)
    assert centre == pytest.approx(4 * (150.5 * 64 / 299 - 0.5), abs=1e-3)


def test_an_unknown_chain_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'clean'"):
        resized(_images(8, 8), "cleann")
