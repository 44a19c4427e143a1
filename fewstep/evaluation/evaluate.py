"""Scores a model folder, or a folder of images, with metrics named on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import to_uint8
from ..data.registry import make_source
from ..data.source import Source
from ..errors import UserError, nearest
from ..models.folder import card
from .features import FEATURES, FeatureNetwork, feature_network, reference_features
from .manifest import Protocol, Score
from .metrics import EvaluationSet
from .registry import METRICS
from .samples import draw, is_pipeline, read_images, write_run

VERSION = "1"  # of the metrics' numbers: raised when a value would change, so that old scores are not compared with new
LARGEST_DEFAULT = 10_000


@dataclass(frozen=True)
class Reference:
    """Real images: uint8 [m, C, H, W], and the words that name them in a protocol."""

    images: Tensor
    name: str


def evaluate(
    model: str | Path,
    metrics: Sequence[str] = ("fid", "prdc"),
    n: int | None = None,
    features: str | None = None,
    reference: str | Mapping[str, Any] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 256,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Scores `model`, an exported pipeline (n images are drawn) or a folder of images (n None: all of them).

    n: default as many as the reference has, at most 10,000. features, reference: default to what the model's
    fewstep.json says. reference: a data source, by name or as in a recipe. out: folder for images, manifest and scores.

    Returns `model, features, n, seed`, how the images were made (`nfe, ms_per_image, steps, timesteps, scheduler,
    guidance`), `values` (name -> number) and `scores` (each value with its protocol and its label `fid[digits-cnn]`).
    Raises UserError for unknown names, missing weights, images that do not fit the network or the reference.
    """
    folder = Path(model)
    pipeline = is_pipeline(folder)
    for name in metrics:
        METRICS.get(name)  # before an hour of sampling
    said = card(folder).get("evaluation") or {}
    network = feature_network(_named(features or said.get("features")))
    real = load_reference(reference or said.get("reference"))
    wanted = n or (min(len(real.images), LARGEST_DEFAULT) if real else 1000)
    made = draw(folder, wanted, seed, steps, guidance, batch) if pipeline else read_images(folder, n)
    values = score(made.images, made.labels, real.images if real else None, network, metrics)
    scores = [Score(value, _protocol(name, len(made.images), network, real)) for name, value in values.items()]
    if out is not None:
        write_run(made, scores, Path(out), seed)
    return {
        "model": str(folder),
        "features": network.name,
        "n": len(made.images),
        "seed": seed,
        **made.facts,
        "values": values,
        "scores": [s.plain() for s in scores],
    }


def score(
    images: Tensor,
    labels: Tensor | None,
    reference: Tensor | None,
    features: str | FeatureNetwork,
    metrics: Sequence[str],
) -> dict[str, float]:
    """Values by name of uint8 images [n, C, H, W] against `reference` [m, C, H, W]; labels [n] are what was asked for.

    A metric may give several numbers. UserError when the two differ in shape, or a metric needs what is None.
    """
    images = images.cpu()
    if reference is not None and reference.shape[1:] != images.shape[1:]:
        sizes = [" x ".join(str(s) for s in x.shape[1:]) for x in (images, reference)]
        raise UserError(f"generated images are {sizes[0]}, the reference's {sizes[1]}: choose a reference of that size")
    network = feature_network(features) if isinstance(features, str) else features
    data = EvaluationSet(
        generated=network.features(images),
        reference=reference_features(network, reference) if reference is not None else None,
        labels=labels.cpu() if labels is not None else None,
        logits=network.logits(images),
    )
    values: dict[str, float] = {}
    for name in metrics:
        values.update(METRICS.get(name)(data))
    return values


def _named(features: str | None) -> str:
    if features is None:
        raise UserError(f"no feature network is named: set `features`; {nearest('', FEATURES.names())}")
    return features


def _protocol(metric: str, n: int, network: FeatureNetwork, reference: Reference | None) -> Protocol:
    foreign = network.impl != "fewstep"
    return Protocol(
        metric=metric,
        n=n,
        impl=f"fewstep + {network.impl}" if foreign else "fewstep",
        impl_version=f"{VERSION} + {network.version}",
        features=network.name,
        weights_sha256=network.sha256,
        resize=network.resize,
        reference=reference.name if reference is not None else "none",
    )


def load_reference(said: str | Mapping[str, Any] | None) -> Reference | None:
    """All images of a data source, given by name or as in a recipe; None stays None."""
    if said is None:
        return None
    config = {"source": said} if isinstance(said, str) else dict(said)
    source = make_source(config)
    if source.row_shape is None:
        raise UserError(f"reference: source '{config['source']}' has no images: name one that has, e.g. digits")
    words = " ".join(f"{key}={value}" for key, value in config.items() if key != "path")
    return Reference(_pixels(source), f"{words} n={len(source)} sha256={source.content_key()[:16]}")


def _pixels(source: Source) -> Tensor:
    parts = torch.arange(len(source)).split(4096)
    return torch.cat([to_uint8(source.fetch(ids, None)["x0"]) for ids in parts])
