"""Scores a model folder, or a folder of images, with metrics named on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import to_uint8
from ..data.registry import make_source
from ..data.source import Source, digest
from ..errors import UserError
from ..models.folder import card
from ..rewards.base import Reward
from ..rewards.registry import make_reward
from ..store import content_key
from .features import FeatureNetwork, feature_network
from .manifest import Protocol, Score
from .metrics import MEASURED_BY, EvaluationSet, named
from .registry import METRICS
from .samples import Made, draw, is_pipeline, read_images, write_run

VERSION = "1"  # of the metrics' numbers: raised when a value would change, so that old scores are not compared with new
LARGEST_DEFAULT = 10_000
_ROWS = 256  # images of a reference that are held as numbers at once


@dataclass(frozen=True)
class Reference:
    """Real images (uint8 [m, C, H, W]), captions (m texts), or both, and the words that name them in a protocol."""

    images: Tensor | None
    name: str
    prompts: list[str] | None
    count: int


@dataclass(frozen=True)
class Instrument:
    """What a value is read with, in a protocol's words: a feature network, a reward, or the pixels themselves."""

    name: str
    impl: str
    version: str
    sha256: str
    resize: str


PIXELS = Instrument("pixels", "fewstep", "1", "none", "none")


def evaluate(
    model: str | Path,
    metrics: Sequence[str] = ("fid", "prdc"),
    n: int | None = None,
    features: str | None = None,
    reference: str | Mapping[str, Any] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    out: str | Path | None = None,
    reward: str | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores `model`, an exported pipeline (n images are drawn) or a folder of images (n None: all of them).

    n: default as many as the reference has, at most 10,000. features, reference, reward: default to what the model's
    fewstep.json says. reference: a data source, by name or as in a recipe; a text-to-image model draws its captions or
    prompts. reward: a name, or as in a recipe. batch: default 256, or 8 with prompts. out: folder for images, manifest
    and scores.

    Returns `model, features, n, seed`, how the images were made (`nfe, ms_per_image, steps, timesteps, scheduler,
    guidance`), `values` (name -> number) and `scores` (each value with its protocol and its label `fid[digits-cnn]`).
    Raises UserError for unknown names, missing weights, images that do not fit the network or the reference.
    """
    folder = Path(model)
    pipeline = is_pipeline(folder)
    for name in metrics:
        METRICS.get(name)  # before an hour of sampling
    said = card(folder).get("evaluation") or {}
    network = network_for(metrics, features or said.get("features"))
    judge, judging = judge_for(metrics, reward or said.get("reward"))
    real = load_reference(reference or said.get("reference"))
    wanted = n or (min(real.count, LARGEST_DEFAULT) if real else 1000)
    captions = real.prompts if real else None
    made = draw(folder, wanted, seed, steps, guidance, batch, captions) if pipeline else read_images(folder, n)
    values = score(made.images, made.labels, real.images if real else None, network, metrics, judge, made.prompts)
    tools = {"pixels": PIXELS, "reward": judging, "features": network}
    scores = [Score(v, _protocol(k, made, tools[MEASURED_BY.get(k, "features")], real)) for k, v in values.items()]
    if out is not None:
        write_run(made, scores, Path(out), seed)
    return {
        "model": str(folder),
        "features": network.name if network is not None else None,
        "n": len(made.images),
        "seed": seed,
        **made.facts,
        "values": values,
        "scores": [s.plain() for s in scores],
    }


def score(
    images: Tensor,
    labels: Tensor | None,
    reference: Tensor | Callable[[], Tensor | None] | None,
    features: str | FeatureNetwork | None,
    metrics: Sequence[str],
    judge: Reward | None = None,
    prompts: Sequence[str] | None = None,
) -> dict[str, float]:
    """Values by name of uint8 images [n, C, H, W] against `reference` [m, C, H, W]; labels [n], prompts: what was asked.

    reference may be a function that loads it, called when a metric reads it. A metric may give several numbers. UserError
    when the two differ in shape, or a metric needs what is None.
    """
    network = feature_network(features) if isinstance(features, str) else features
    asked = labels.cpu() if labels is not None else None
    data = EvaluationSet(images.cpu(), reference, asked, prompts, network, judge)
    values: dict[str, float] = {}
    for name in metrics:
        values.update(METRICS.get(name)(data))
    return values


def network_for(metrics: Sequence[str], name: str | None) -> FeatureNetwork | None:
    """The feature network of that name; None when no metric reads one. UserError when one is needed and none named."""
    return feature_network(named(name)) if any(metric not in MEASURED_BY for metric in metrics) else None


def judge_for(metrics: Sequence[str], said: str | Mapping[str, Any] | None) -> tuple[Reward | None, Instrument | None]:
    """The reward that `said` describes, and how a protocol names it; None when it is not asked for.

    UserError when the metric `reward` is asked for and no reward is named.
    """
    if "reward" not in metrics:
        return None, None
    if said is None:
        raise UserError(
            "the metric reward has no reward: name one, `--reward classifier` or `evaluation: {reward: NAME}`"
        )
    judge = make_reward(said).to("cuda" if torch.cuda.is_available() else "cpu")
    return judge, Instrument(_words(said), "fewstep", "1", content_key(dict(judge.state_dict())), "the reward's own")


def _words(said: str | Mapping[str, Any]) -> str:
    """A reward's names, factors and options without its folders, e.g. `hpsv2 + 0.1 image_reward`."""
    if isinstance(said, str):
        return said
    parts = []
    for name, given in said.items():
        options = dict(given) if isinstance(given, Mapping) else {}
        weight = options.pop("weight", 1)
        words = "".join(f" {key}={value}" for key, value in options.items() if key not in ("from", "source"))
        parts.append(f"{'' if weight == 1 else f'{weight:g} '}{name}{words}")
    return " + ".join(parts)


def _protocol(
    metric: str, made: Made, tool: FeatureNetwork | Instrument | None, reference: Reference | None
) -> Protocol:
    assert tool is not None  # a metric without its tool has raised
    foreign = tool.impl != "fewstep"
    return Protocol(
        metric=metric,
        n=len(made.images),
        impl=f"fewstep + {tool.impl}" if foreign else "fewstep",
        impl_version=f"{VERSION} + {tool.version}",
        features=tool.name,
        weights_sha256=tool.sha256,
        resize=tool.resize,
        reference=_against(metric, made, reference),
    )


def _against(metric: str, made: Made, reference: Reference | None) -> str:
    """What the images are compared with: the reference, or of a reward the prompts."""
    if MEASURED_BY.get(metric) != "reward":
        return reference.name if reference is not None else "none"
    return f"prompts sha256={digest(*made.prompts)[:16]}" if made.prompts else "none"


def load_reference(said: str | Mapping[str, Any] | None) -> Reference | None:
    """All images and captions of a data source, given by name or as in a recipe; None stays None."""
    if said is None:
        return None
    config = {"source": said} if isinstance(said, str) else dict(said)
    source = make_source(config)
    images, prompts = contents(source)
    if images is None and prompts is None:
        raise UserError(f"reference: source '{config['source']}' has no images: name one that has, e.g. digits")
    words = " ".join(f"{key}={value}" for key, value in config.items() if key != "path")
    name = f"{words} n={len(source)} sha256={source.content_key()[:16]}"
    return Reference(images, name, prompts, len(source))


def contents(source: Source, most: int | None = None) -> tuple[Tensor | None, list[str] | None]:
    """uint8 images [m, C, H, W] and captions (m texts) of a source; None for what it has not.

    most: so many at most, at equal distances; None: all.
    """
    m = min(len(source), most or len(source))
    pixels, texts = [], []
    for ids in (torch.arange(m) * len(source) // m).split(_ROWS):
        rows = source.fetch(ids, None)
        pixels += [to_uint8(rows["x0"])] if "x0" in rows else []
        texts += rows.get("prompt", [])
    return torch.cat(pixels) if pixels else None, texts or None
