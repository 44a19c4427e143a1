"""The log-probability that a shipped classifier gives to the label that was asked for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..nets.small_cnn import SmallCNN
from .base import Asked, Reward, RewardSpec


class ClassifierSpec(RewardSpec):
    """Options of `classifier`."""

    features: Literal["digits-cnn", "fashion-cnn"] = "digits-cnn"


class Classifier(Reward):
    """R(x, y) = log softmax(logits(x))_y <= 0, in nats. Labels are those of the classifier's own data, 0..9."""

    name = "classifier"
    Config = ClassifierSpec
    needs = "label"

    def __init__(self, spec: ClassifierSpec = ClassifierSpec()):  # noqa: B008  (frozen)
        super().__init__()
        self.features, self.network = spec.features, SmallCNN.shipped(spec.features)
        self.channels = self.network.channels

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """log p(label | image), [rows]."""
        if images.shape[1] != self.channels:
            raise UserError(
                f"reward 'classifier': {self.features} sees {self.channels} channel(s), the images have {images.shape[1]}: "
                "set config.reward.classifier.features to another network"
            )
        assert asked.labels is not None
        with torch.autocast(images.device.type, enabled=False):
            logits = self.network(images.float())
            return -F.cross_entropy(logits, asked.labels.to(images.device), reduction="none")
