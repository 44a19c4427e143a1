"""The metrics by name: each takes an `EvaluationSet` and gives named numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..maths.spectrum import high_frequency_share
from ..rewards.base import Asked, Reward
from .features import FEATURES, FeatureNetwork, reference_features
from .fid import Moments, frechet_distance
from .inception_score import inception_score as score_of_classes
from .kid import kernel_distance
from .prdc import distances, prdc
from .prdc import precision_recall as closed_balls
from .statistics import Statistics

N = TypeVar("N", str, FeatureNetwork)
NEIGHBOURS = 5
MEASURED_BY = {"high_frequency": "pixels", "reward": "reward"}  # all other values: by the feature network
_BLOCK = 1024
_ROWS = 64  # images in one pass of the spectrum or of a reward; bounds memory


@dataclass(frozen=True)
class EvaluationSet:
    """What a metric may look at: images, what was asked for, and the networks that judge them. All but `images` may be None.

    images [n, C, H, W], real [m, C, H, W]: uint8; `real` may be a function that loads them. labels [n], prompts (n texts):
    what was asked for. network gives the features `generated` [n, d] and `reference` [m, d] (None without real images)
    and the class scores `logits` [n, classes] of the images (None when it has none). judge: the reward. statistics: of
    the real images' features, where FID is to use them in place of the images. What is not a field is loaded or computed
    when a metric first reads it.
    """

    images: Tensor
    real: Tensor | Callable[[], Tensor | None] | None = None
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None
    network: FeatureNetwork | None = None
    judge: Reward | None = None
    statistics: Statistics | None = None

    @cached_property
    def reference_images(self) -> Tensor | None:
        """The real images [m, C, H, W]. UserError when they are not of the images' shape."""
        real = self.real() if callable(self.real) else self.real
        if real is not None and real.shape[1:] != self.images.shape[1:]:
            made, given = (" x ".join(str(side) for side in x.shape[1:]) for x in (self.images, real))
            raise UserError(f"generated images are {made}, the reference's {given}: choose a reference of that size")
        return real

    @cached_property
    def generated(self) -> Tensor:
        """Features of the images [n, d]."""
        return named(self.network).features(self.images)

    @cached_property
    def reference(self) -> Tensor | None:
        """Features of the reference images [m, d]."""
        real = self.reference_images
        return None if real is None else reference_features(named(self.network), real)

    @cached_property
    def logits(self) -> Tensor | None:
        """Class scores of the images [n, classes]."""
        return named(self.network).logits(self.images)

    @cached_property
    def class_scores(self) -> Tensor | None:
        """Logits [n, classes] over the network's own classes, whether or not they are those of the data."""
        of_features = getattr(named(self.network), "class_scores", None)
        return of_features(self.generated) if of_features is not None else self.logits

    def need(self, field: str, metric: str, mend: str) -> Any:
        """The field's value; UserError with the mend when it is None."""
        value = getattr(self, field)
        if value is None:
            raise UserError(f"{metric} needs {field}, and there are none: {mend}")
        return value


def named(network: N | None) -> N:
    """A feature network, or the name of one; UserError when it is None."""
    if network is None:
        raise UserError(f"no feature network is named: set `features`; {nearest('', FEATURES.names())}")
    return network


def fid(data: EvaluationSet) -> dict[str, float]:
    """`fid`: Frechet distance of generated to reference features, or to statistics of them."""
    if data.statistics is not None:
        data.statistics.fit(named(data.network))
        return {"fid": frechet_distance(Moments.of(data.generated), data.statistics)}
    reference = data.need("reference", "fid", "give `reference`, e.g. {source: digits}")
    return {"fid": frechet_distance(Moments.of(data.generated), Moments.of(reference))}


def kid(data: EvaluationSet) -> dict[str, float]:
    """`kid`, `kid_std`: unbiased kernel distance over 100 random subsets of 1000, or of all when there are fewer."""
    reference = data.need("reference", "kid", "give `reference`, e.g. {source: digits}")
    return kernel_distance(reference, data.generated)


def inception_score(data: EvaluationSet) -> dict[str, float]:
    """`inception_score`, `inception_score_std`: over 10 parts, of the feature network's own classes."""
    mend = "use `features` that tell classes, e.g. inception"
    return score_of_classes(data.need("class_scores", "inception_score", mend))


def torch_fidelity_prc(data: EvaluationSet) -> dict[str, float]:
    """`prc_precision`, `prc_recall`, `prc_f_score`: torch-fidelity's convention, <= and k = 3, all images of both sets."""
    reference = data.need("reference", "prc", "give `reference`, e.g. {source: digits}")
    return {f"prc_{name}": value for name, value in closed_balls(reference, data.generated).items()}


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
    labels = data.labels.tolist() if data.labels is not None else [0] * len(data.generated)
    return {"diversity": mean_spread(data.generated, labels, "diversity needs two images of some class: raise n")}


def prompt_diversity(data: EvaluationSet) -> dict[str, float]:
    """`prompt_diversity`: mean feature distance of two images of one prompt, averaged over prompts with two or more."""
    prompts = data.need("prompts", "prompt_diversity", "give `reference` with captions, or {source: prompts, ...}")
    mend = "prompt_diversity needs two images of some prompt: draw more images than there are prompts"
    return {"prompt_diversity": mean_spread(data.generated, prompts, mend)}


def mean_spread(x: Tensor, groups: Sequence[Hashable], mend: str) -> float:
    """Mean over the groups of x [n, d] of their `mean_pairwise_distance`; UserError(mend) when none has two rows."""
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    spreads = [mean_pairwise_distance(x[chosen]) for chosen in rows.values() if len(chosen) > 1]
    if not spreads:
        raise UserError(mend)
    return sum(spreads) / len(spreads)


@torch.no_grad()
def high_frequency(data: EvaluationSet) -> dict[str, float]:
    """`high_frequency`: mean share of spectral energy above half the Nyquist radius, over that of the reference images.

    1 is natural; a reward that is optimised too far drives it up, blur brings it down.
    """
    real = data.need("reference_images", "high_frequency", "give `reference`, e.g. {source: digits}")
    natural = _mean(high_frequency_share(x) for _, x in _scaled(real))
    if natural == 0:
        raise UserError("high_frequency: the reference images are flat: choose a reference of real images")
    return {"high_frequency": _mean(high_frequency_share(x) for _, x in _scaled(data.images)) / natural}


@torch.no_grad()
def reward(data: EvaluationSet) -> dict[str, float]:
    """`reward`: mean reward of the images for what was asked of them."""
    judge = data.need("judge", "reward", "name a reward, e.g. `reward: classifier`")
    device = next((p.device for p in judge.parameters()), torch.device("cpu"))
    asked = Asked(data.prompts, data.labels)
    return {"reward": _mean(judge(x.to(device), asked[rows]) for rows, x in _scaled(data.images))}


def _scaled(images: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """uint8 images in parts, as numbers in [-1, 1], with the rows that a part holds."""
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, images[rows].float() / 127.5 - 1


def _mean(parts: Iterable[Tensor]) -> float:
    return torch.cat(list(parts)).double().mean().item()


def mean_pairwise_distance(x: Tensor) -> float:
    """Mean distance over the n (n - 1) ordered pairs of different rows of x [n, d]."""
    x = x.double()
    total = sum(distances(part, x).sum().item() for part in x.split(_BLOCK))
    return total / (len(x) * (len(x) - 1))


def _some(rows: Tensor, n: int) -> Tensor:
    # not the first n: folders are sorted by class, and labels come in turns
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]
    return rows[chosen.sort().values]
