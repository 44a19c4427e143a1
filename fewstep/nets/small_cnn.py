"""A small image classifier whose penultimate activations serve as a feature space for scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 64
_GRID = 2  # positions kept a side: with a plain mean over positions, a garment's sleeves and hem look alike


class SmallCNN(nn.Module):
    """Four 3x3 convolutions (two of them halve the sides), means over quarters of the image, a hidden layer
    of 64, logits.

    Input [n, channels, H, W] in [-1, 1] of any size from 4x4 on. `feature_mean` and `feature_std` [64] standardise the
    hidden layer over the training set; they are buffers, stored with the weights.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, channels: int = 1, width: int = 32, classes: int = 10):
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, width, stride=1),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 2 * width, stride=1),
            *_convolution(2 * width, 2 * width, stride=2),
        )
        self.hidden = nn.Linear(2 * width * _GRID**2, FEATURES)
        self.head = nn.Linear(FEATURES, classes)
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_std", torch.ones(FEATURES))

    def embed(self, x: Tensor) -> Tensor:
        """Hidden activations [n, 64], as they are."""
        quarters = nn.functional.adaptive_avg_pool2d(self.body(x), _GRID)
        return nn.functional.silu(self.hidden(quarters.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.head(self.embed(x))

    def features(self, x: Tensor) -> Tensor:
        """(h - mean) / (std sqrt(64)), [n, 64]: over the training set E|f|^2 = 1, so distances have a unit scale."""
        return (self.embed(x) - self.feature_mean) / (self.feature_std * FEATURES**0.5)

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Sets mean and std from the images `x` of the training set."""
        hidden = torch.cat([self.embed(part) for part in x.split(512)]).double()
        self.feature_mean.copy_(hidden.mean(0))
        self.feature_std.copy_(hidden.std(0).clamp(min=1e-6))


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()
