"""Share of high frequencies: images whose spectrum is known, and its gradient."""

import math

import pytest
import torch

from fewstep.maths.spectrum import high_frequency_share


def _wave(size, cycles, axis=-1, phase=0.3):
    line = torch.cos(2 * math.pi * cycles * torch.arange(size) / size + phase)
    image = line.expand(size, size) if axis == -1 else line[:, None].expand(size, size)
    return image.expand(1, 1, size, size)


def _checkerboard(size):
    row = torch.arange(size)
    return (1.0 - 2.0 * ((row[:, None] + row) % 2)).expand(1, 1, size, size)


@pytest.mark.parametrize("level", [0.0, 0.7, -5.0])
def test_a_checkerboard_on_any_constant_is_all_high(level):
    """The mean of a channel plays no part, so the only energy is at (1/2, 1/2)."""
    assert high_frequency_share(level + 0.1 * _checkerboard(8)).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("axis", [-1, -2])
def test_one_wave_is_low_up_to_a_quarter_cycle_a_pixel_and_high_above(axis):
    shares = [high_frequency_share(_wave(32, cycles, axis)).item() for cycles in (1, 7, 8, 9, 15)]
    assert shares == pytest.approx([0, 0, 0, 1, 1], abs=1e-6)


def test_the_radius_is_euclidean():
    """A diagonal wave of 6 cycles along each side has 8.5 cycles in all, over the circle of 8."""
    row = torch.arange(32)
    waves = [torch.cos(2 * math.pi * cycles * (row[:, None] + row) / 32) for cycles in (5, 6)]
    assert high_frequency_share(torch.stack(waves)[:, None]).tolist() == pytest.approx([0, 1], abs=1e-5)


def test_energies_of_waves_add_up():
    """A low wave of amplitude 2 and a high one of amplitude 1: one part of five is high."""
    assert high_frequency_share(2 * _wave(32, 3) + _wave(32, 12)).item() == pytest.approx(1 / 5, abs=1e-6)


def test_white_noise_gives_the_area_outside_the_circle():
    """1 - pi/16 = .8037 of the square of frequencies."""
    x = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert high_frequency_share(x).mean().item() == pytest.approx(1 - math.pi / 16, abs=5e-3)


def test_flat_images_have_no_high_frequencies_and_a_finite_gradient():
    flat = torch.full((2, 3, 9, 7), 0.3).requires_grad_()
    share = high_frequency_share(flat)
    share.sum().backward()
    assert share.tolist() == pytest.approx([0, 0], abs=1e-4)
    assert flat.grad.isfinite().all()


def test_contrast_brightness_and_shifts_change_nothing():
    x = torch.randn(5, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    share = high_frequency_share(x)
    for changed in (3 * x, x + 0.5, x.roll((3, 5), (-2, -1)), x.flip(-1)):
        torch.testing.assert_close(high_frequency_share(changed), share, rtol=1e-5, atol=1e-6)


def test_rows_are_judged_alone_and_channels_together():
    waves = torch.cat([_wave(16, 1), _wave(16, 6)])
    assert high_frequency_share(waves).tolist() == pytest.approx([0, 1], abs=1e-6)
    assert high_frequency_share(waves[None, :, 0]).tolist() == pytest.approx([0.5], abs=1e-6)


def test_half_precision_is_computed_in_float32():
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert high_frequency_share(x).dtype == torch.float32
    assert torch.equal(high_frequency_share(x), high_frequency_share(x.float()))


def test_the_gradient_is_that_of_finite_differences():
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(high_frequency_share, x)
