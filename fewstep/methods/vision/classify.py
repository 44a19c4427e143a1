"""Plain training of a classifier with labels: makes the teachers of the vision methods, and is their baseline."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ...data.batch import Batch
from ...data.crops import CropSpec, random_crops, replay
from ...draws import Draw
from ...maths.losses import cross_entropy_rows
from ...roles import Role
from ..base import MethodConfig, Total, Update
from .base import ClassifierMethod


class ClassifyConfig(MethodConfig):
    """Knobs of `classify`."""

    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="eps: this share of the target is spread over all classes"
    )
    crop: CropSpec | None = Field(default=None, description="train on random resized crops; null = on whole images")


class Classify(ClassifierMethod):
    """min -log softmax(z)_y, with label smoothing when `smoothing` says so. Term: `hard`."""

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
        loss = cross_entropy_rows(self.student(x), batch.cond["label"], self.config.smoothing)
        yield Update("student", {"hard": loss})
