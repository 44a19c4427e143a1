"""Where the energy of an image lies: the share of high frequencies, which over-optimised rewards drive up."""

from __future__ import annotations

import torch
from torch import Tensor

CUT = 0.25  # cycles per pixel: half of Nyquist's 0.5
_FLOOR = 1e-10  # mean square below which an image counts as flat; a grey level's rounding in [-1, 1] is 5e-6


def high_frequency_share(images: Tensor) -> Tensor:
    """Share of the spectral energy above half the Nyquist radius, [rows], of images [rows, C, H, W].

        E(f) = sum over channels |FFT2(x - mean x)|^2,    share = sum_{|f| > 1/4} E / sum_f E

    with f in cycles per pixel and |f| its Euclidean length. The mean of each channel plays no part. White noise gives
    the area outside the circle, about 1 - pi / 16; a flat image gives 0. In float32 (float64 stays); differentiable.
    """
    x = images if images.dtype == torch.float64 else images.float()
    energy = torch.fft.fft2(x - x.mean((-2, -1), keepdim=True), norm="ortho").abs().square().sum(1)
    high = _radius(x.shape[-2], x.shape[-1], x) > CUT
    floor = _FLOOR * x[0].numel()
    return (energy * high).sum((-2, -1)) / energy.sum((-2, -1)).clamp(min=floor)


def _radius(height: int, width: int, like: Tensor) -> Tensor:
    """|f| in cycles per pixel of every bin, [H, W]."""
    y = torch.fft.fftfreq(height, device=like.device, dtype=like.dtype)
    x = torch.fft.fftfreq(width, device=like.device, dtype=like.dtype)
    return torch.hypot(y[:, None], x[None, :])
