"""Feature networks by name. A score is only comparable within one of them, so every score carries the name."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..registry import Registry
from ..resources import asset

FEATURES = Registry(
    "feature network",
    "fewstep.features",
    {
        "digits-cnn": "fewstep.evaluation.features:digits_cnn",
        "fashion-cnn": "fewstep.evaluation.features:fashion_cnn",
        "inception": "fewstep.evaluation.inception:inception",
        "inception-clean": "fewstep.evaluation.inception:inception_clean",
        "inception-legacy": "fewstep.evaluation.inception:inception_legacy",
    },
)
_REMEMBERED: dict[tuple[str, str], Tensor] = {}


class FeatureNetwork(Protocol):
    """Maps uint8 images [n, C, H, W] to float32 features [n, d].

    name: as in tables, `fid[name]`. impl, version: the code that computes it. sha256: of the weights.
    resize: how images reach the network's size, a chain of `resize` or in words; "none" when it takes any size. A network
    that tells classes which are not those of the data may have `class_scores(features) -> [n, classes]`, for the
    Inception Score.
    """

    name: str
    impl: str
    version: str
    sha256: str
    resize: str

    def features(self, images: Tensor) -> Tensor:
        """Features [n, d] of any number of images."""

    def logits(self, images: Tensor) -> Tensor | None:
        """Class scores [n, classes] over the classes of the data, or None."""


def feature_network(name: str) -> FeatureNetwork:
    """The network called `name`; UserError with the nearest name, or with the weights that are missing."""
    return FEATURES.get(name)()


def reference_features(network: FeatureNetwork, images: Tensor) -> Tensor:
    """`network.features(images)`, remembered: a run scores many students against one reference."""
    key = (hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(), network.sha256)
    if key not in _REMEMBERED:
        while len(_REMEMBERED) >= 4:
            del _REMEMBERED[next(iter(_REMEMBERED))]
        _REMEMBERED[key] = network.features(images)
    return _REMEMBERED[key]


def digits_cnn() -> ClassifierFeatures:
    """64 activations of a classifier of 8x8 digits."""
    return ClassifierFeatures("digits-cnn", asset("features/digits-cnn.safetensors"))


def fashion_cnn() -> ClassifierFeatures:
    """64 activations of a classifier of Fashion-MNIST at 28x28 and 16x16."""
    return ClassifierFeatures("fashion-cnn", asset("features/fashion-cnn.safetensors"))


class ClassifierFeatures:
    """A shipped `SmallCNN`, standardised so that real training images have E|f|^2 = 1."""

    impl = "fewstep"
    version = "1"
    resize = "none"
    rows = 512  # one forward pass; bounds memory, changes no result beyond rounding

    def __init__(self, name: str, file: Path):
        from ..nets.small_cnn import header

        self.name, self.file = name, file
        self.metadata = header(file)
        self.sha256 = self.metadata["sha256"]

    @cached_property
    def _network(self) -> Any:
        from ..nets.small_cnn import SmallCNN

        return SmallCNN.read(self.file)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[n, 64]."""
        return torch.cat([self._network.features(self._scaled(part)) for part in images.split(self.rows)])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[n, 10]."""
        return torch.cat([self._network(self._scaled(part)) for part in images.split(self.rows)])

    def _scaled(self, images: Tensor) -> Tensor:
        channels = int(self.metadata["channels"])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            got = f"{images.dtype} {list(images.shape)}"
            raise UserError(
                f"{self.name} takes uint8 images [n, {channels}, H, W], not {got}: choose another `features`"
            )
        # strides too decide which convolution runs, and one channel may come with those of channels-last
        return images.clone(memory_format=torch.contiguous_format).to(torch.float32) / 127.5 - 1


def weights_folder() -> Path:
    """Where large feature weights are looked for: `$FEWSTEP_WEIGHTS`, else `~/.cache/fewstep/weights`."""
    return Path(os.environ.get("FEWSTEP_WEIGHTS") or Path.home() / ".cache/fewstep/weights")
