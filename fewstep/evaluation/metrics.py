"""The metrics by name: each takes an `EvaluationSet` and gives named numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .fid import Moments, frechet_distance
from .prdc import distances, prdc

NEIGHBOURS = 5
_BLOCK = 1024


@dataclass(frozen=True)
class EvaluationSet:
    """What a metric may look at.

    generated [n, d], reference [m, d]: features. labels [n]: the classes that were asked for. logits [n, classes]: what
    the feature network says about the generated images. Each of the last three may be None.
    """

    generated: Tensor
    reference: Tensor | None = None
    labels: Tensor | None = None
    logits: Tensor | None = None

    def need(self, field: str, metric: str, mend: str) -> Tensor:
        """The field's value; UserError with the mend when it is None."""
        value = getattr(self, field)
        if value is None:
            raise UserError(f"{metric} needs {field}, and there are none: {mend}")
        return value


def fid(data: EvaluationSet) -> dict[str, float]:
    """`fid`: Frechet distance of generated to reference features."""
    reference = data.need("reference", "fid", "give `reference`, e.g. {source: digits}")
    return {"fid": frechet_distance(Moments.of(data.generated), Moments.of(reference))}


def precision_recall(data: EvaluationSet) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` at k = 5.

    Recall and coverage rise with set size, so the larger set is cut to the smaller one's size by a fixed random choice.
    """
    reference = data.need("reference", "prdc", "give `reference`, e.g. {source: digits}")
    n = min(len(reference), len(data.generated))
    return prdc(_some(reference, n), _some(data.generated, n), NEIGHBOURS)


def accuracy(data: EvaluationSet) -> dict[str, float]:
    """`accuracy`: share of generated images that the feature network's classifier puts in the class asked for."""
    labels = data.need("labels", "accuracy", "sample a class-conditional model, or use class folders")
    logits = data.need("logits", "accuracy", "use `features` with a classifier, e.g. digits-cnn")
    return {"accuracy": (logits.argmax(1) == labels).double().mean().item()}


def diversity(data: EvaluationSet) -> dict[str, float]:
    """`diversity`: mean feature distance of two images of one class, averaged over classes (no labels: one class)."""
    labels = data.labels if data.labels is not None else torch.zeros(len(data.generated), dtype=torch.int64)
    groups = [data.generated[labels == label] for label in labels.unique()]
    spreads = [mean_pairwise_distance(group) for group in groups if len(group) > 1]
    if not spreads:
        raise UserError("diversity needs two images of some class: raise n")
    return {"diversity": sum(spreads) / len(spreads)}


def mean_pairwise_distance(x: Tensor) -> float:
    """Mean distance over the n (n - 1) ordered pairs of different rows of x [n, d]."""
    x = x.double()
    total = sum(distances(part, x).sum().item() for part in x.split(_BLOCK))
    return total / (len(x) * (len(x) - 1))


def _some(rows: Tensor, n: int) -> Tensor:
    # not the first n: folders are sorted by class, and labels come in turns
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]
    return rows[chosen.sort().values]
