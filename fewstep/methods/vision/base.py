"""What methods with a classifier as student share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...data.batch import Batch
from ...maths.losses import cross_entropy_rows
from ...roles import Handle
from ..base import Method


class ClassifierMethod(Method):
    """A method whose student maps images `batch.x0` to logits [rows, classes]; scored against `batch.cond.label`."""

    kind = "vision"
    student: Handle

    def validation(self, batch: Batch) -> Mapping[str, Tensor]:
        """accuracy (0 or 1) and cross_entropy of each row."""
        logits, label = self.student(batch.x0).float(), batch.cond["label"]
        return {
            "accuracy": (logits.argmax(-1) == label).float(),
            "cross_entropy": cross_entropy_rows(logits, label),
        }
