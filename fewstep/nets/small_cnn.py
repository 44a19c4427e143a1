"""A small image classifier whose penultimate activations serve as a feature space for scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..resources import asset

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
        self.channels = channels
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

    @classmethod
    def shipped(cls, name: str) -> SmallCNN:
        """A network that travels with fewstep, in eval mode: "digits-cnn" or "fashion-cnn"."""
        return cls.read(asset(f"features/{name}.safetensors"))

    @classmethod
    def read(cls, file: Path) -> SmallCNN:
        """The network in `file`. UserError when there is none, or its weights are not those the header names.

        On the meta device it has sizes and no weights.
        """
        from safetensors.torch import load_file

        said = header(file)
        network = cls(**{key: int(said[key]) for key in ("channels", "width", "classes")}).eval()
        if torch.get_default_device().type == "meta":
            return network
        state = load_file(file)
        if weights_digest(state) != said["sha256"]:
            raise UserError(f"{file.stem}: '{file}' does not have the weights its header names: restore the file")
        network.load_state_dict(state)
        return network

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


def header(file: Path) -> dict[str, str]:
    """What the file of a shipped network says of it: sizes, data, accuracy, sha256. UserError when there is no file."""
    from safetensors import safe_open

    if not file.is_file():
        raise UserError(f"{file.stem}: no file '{file}': reinstall fewstep, or run assets/make_assets.py {file.stem}")
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"])


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes of the tensors, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
