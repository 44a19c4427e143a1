"""Plain training of a classifier with labels: makes the teachers of the vision methods, and is their baseline."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ...data.batch import Batch
from ...data.crops import CropSpec, random_crops, replay
from ...draws import Draw
from ...maths.soft_labels import smooth_one_hot, soft_cross_entropy
from ...roles import Role
from ..base import MethodConfig, Total, Update
from .base import ClassifierMethod


class ClassifyConfig(MethodConfig):
    """Knobs of `classify`."""

    smoothing: float = Field(default=0.0, ge=0, lt=1, description="eps: target 1 - eps on the label, eps / (C - 1) elsewhere")
    crop: CropSpec | None = Field(default=None, description="train on random resized crops; null = on whole images")


class Classify(ClassifierMethod):
    """min -sum_k t_k log softmax(z)_k, with t the (smoothed) label. Term: `hard`."""

    name = "classify"
    Config = ClassifyConfig

    def roles(self) -> tuple[Role, ...]:
        """The classifier, called student as everywhere."""
        return (Role("student", tune="full", train_mode=True),)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """Cross entropy on random crops, or on whole images."""
        x, crop = batch.x0, self.config.crop
        if crop is not None:
            x = replay(x, *random_crops(draw, x.shape[-2:], crop))
        logits = self.student(x)
        targets = smooth_one_hot(batch.cond["label"], logits.shape[-1], self.config.smoothing)
        yield Update("student", {"hard": soft_cross_entropy(logits, targets)})
