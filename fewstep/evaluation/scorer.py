"""What a protocol measures, taken in one pass over the pictures: values of each, and features of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.image_folder import list_images
from ..data.source import digest
from ..errors import UserError, nearest
from .bootstrap import mean_interval
from .evaluate import PIXELS, VERSION, Instrument, load_reference
from .features import FeatureNetwork, feature_network
from .image_metrics import IMAGE_METRICS, ImageMetric
from .manifest import Protocol, Score, pixel_digest
from .metrics import MEASURED_BY, EvaluationSet, named
from .pictures import ROWS, Pictures, fitted
from .prompt_sets import PromptSet
from .protocols import ProtocolFile, ReferenceSpec, check_sha256
from .registry import METRICS
from .statistics import SUFFIXES as STATISTICS
from .statistics import Statistics, read_statistics

Blocks = Iterator[tuple[slice, Tensor]]


@dataclass(frozen=True)
class Scored:
    """scores, and of metrics of images the values [n] of each picture."""

    scores: list[Score]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Real:
    """Real images, a block at a time, and how a protocol names them; or statistics of their features."""

    blocks: Callable[[], Blocks] | None = None
    statistics: Path | None = None
    words: Callable[[], str] = lambda: "none"


class StoredSet(EvaluationSet):
    """An `EvaluationSet` of which features are known beforehand; pixels are read when a metric asks for them."""

    def __init__(self, pixels: Callable[[], Tensor], **known: Any):
        # not by assignment, which a frozen dataclass refuses; features hide the properties that would compute them
        self.__dict__.update(known, _pixels=pixels)

    @cached_property
    def images(self) -> Tensor:
        """All pictures at once."""
        pixels: Tensor = self.__dict__["_pixels"]()
        return pixels


class Scorer:
    """Metrics of a protocol with their networks and weights; may score several sets of pictures.

    UserError at once for unknown metrics and missing weights or references.
    """

    def __init__(self, rules: ProtocolFile):
        self.rules = rules
        self.of_images: dict[str, ImageMetric] = {}
        self.of_sets: dict[str, FeatureNetwork | None] = {}
        for name, said in rules.metrics.items():
            if name in IMAGE_METRICS:
                self.of_images[name] = IMAGE_METRICS.get(name)(_options(name, said))
            else:
                self.of_sets[name] = _network(name, said)
        self.real = _real(rules)
        self._features: dict[str, Tensor] = {}  # of the reference, by the network's weights and resize chain

    def score(self, pictures: Pictures, prompts: PromptSet | None) -> Scored:
        """All scores of the pictures. UserError when a metric needs what there is not."""
        values, features = self._pass(pictures, prompts)
        scores = [score for name, x in values.items() for score in self._of_values(name, x, pictures, prompts)]
        scores += [score for name in self.of_sets for score in self._of_set(name, pictures, prompts, features)]
        return Scored(scores, {self.of_images[name].name: x for name, x in values.items()})

    @property
    def networks(self) -> dict[str, FeatureNetwork]:
        """The feature networks that metrics read, each once, by name."""
        return {network.name: network for network in self.of_sets.values() if network is not None}

    def _pass(self, pictures: Pictures, prompts: PromptSet | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of each picture: values by metric, features by network."""
        values: dict[str, list[Tensor]] = {name: [] for name in self.of_images}
        features: dict[str, list[Tensor]] = {name: [] for name in self.networks}
        for rows, images in pictures.blocks(self.rules.resize) if values or features else ():
            texts = prompts.texts[rows] if prompts is not None else None
            labels = pictures.labels[rows] if pictures.labels is not None else None
            for name, metric in self.of_images.items():
                values[name].append(_finite(metric.values(images, texts, labels).double(), name, pictures, rows))
            for name, network in self.networks.items():
                features[name].append(network.features(images))
        return _joined(values), _joined(features)

    def _of_values(self, name: str, values: Tensor, pictures: Pictures, prompts: PromptSet | None) -> Iterator[Score]:
        """The mean over prompts with its interval, and of groups their means."""
        metric = self.of_images[name]
        against = f"prompts sha256={prompts.sha256[:16]}" if prompts is not None else "none"

        def score(suffix: str, value: float, n: int, interval: tuple[float, float] | None = None) -> Score:
            return Score(value, self._protocol(metric.name + suffix, metric.tool, n, against), interval)

        means = values.view(-1, self.rules.per_prompt).mean(1)
        found = mean_interval(means)
        yield score("", found.mean, len(pictures), (found.low, found.high))
        groups = prompts.groups[:: self.rules.per_prompt] if prompts is not None and prompts.groups else ()
        of_groups = []
        for group in dict.fromkeys(groups):
            here = means[torch.tensor([g == group for g in groups])]
            of_groups.append(here.mean())
            yield score(f".{group}", here.mean().item(), len(here) * self.rules.per_prompt)
            if metric.chunk is not None:
                parts = torch.stack([part.mean() for part in here.split(metric.chunk)])
                yield score(f".{group}.std", parts.std(unbiased=False).item(), len(here) * self.rules.per_prompt)
        if metric.overall and of_groups:
            yield score(".overall", torch.stack(of_groups).mean().item(), len(pictures))

    def _of_set(
        self, name: str, pictures: Pictures, prompts: PromptSet | None, features: Mapping[str, Tensor]
    ) -> Iterator[Score]:
        network = self.of_sets[name]
        known: dict[str, Any] = {
            "real": self._pixels_of_real if self.real.blocks is not None else None,
            "labels": pictures.labels,
            "prompts": prompts.texts if prompts is not None else None,
            "network": network,
            "judge": None,
            "statistics": None,
        }
        if network is not None:
            known |= {"generated": features[network.name], "reference": self._reference(network)}
            known["statistics"] = self._statistics(network)
        found = METRICS.get(name)(StoredSet(lambda: _all(pictures.blocks(self.rules.resize)), **known))
        tool = network or PIXELS
        words = known["statistics"].words if known["statistics"] is not None else self.real.words()
        for key, value in found.items():
            yield Score(value, self._protocol(key, tool, len(pictures), words))

    def _statistics(self, network: FeatureNetwork) -> Statistics | None:
        return None if self.real.statistics is None else read_statistics(self.real.statistics, network)

    def _reference(self, network: FeatureNetwork) -> Tensor | None:
        """Features of the real images, kept for the next set of pictures."""
        if self.real.blocks is None:
            return None
        key = f"{network.sha256} {network.resize}"
        if key not in self._features:
            self._features[key] = torch.cat([network.features(images) for _, images in self.real.blocks()])
        return self._features[key]

    def _pixels_of_real(self) -> Tensor:
        assert self.real.blocks is not None
        return _all(self.real.blocks())

    def _protocol(self, metric: str, tool: FeatureNetwork | Instrument, n: int, reference: str) -> Protocol:
        foreign = tool.impl != "fewstep"
        before = f"{self.rules.resize.words}; then " if self.rules.resize is not None else ""
        return Protocol(
            metric=metric,
            n=n,
            impl=f"fewstep + {tool.impl}" if foreign else "fewstep",
            impl_version=f"{VERSION} + {tool.version}",
            features=tool.name,
            weights_sha256=tool.sha256,
            resize=before + tool.resize,
            reference=reference,
        )


def _options(name: str, said: Any) -> Mapping[str, Any]:
    if said is not None and not isinstance(said, Mapping):
        raise UserError(f"metrics.{name}={said!r} is no mapping of options: write {name}: {{key: value}}")
    return said or {}


def _network(name: str, said: Any) -> FeatureNetwork | None:
    """The feature network of a set metric, `fid: inception` or `fid: {features: inception}`; None when it reads none."""
    if name not in METRICS:
        known = [*METRICS.names(), *IMAGE_METRICS.names()]
        raise UserError(f"unknown metric '{name}': {nearest(name, known)}")
    options = {"features": said} if isinstance(said, str) else dict(_options(name, said))
    features = options.pop("features", None)
    if options:
        raise UserError(f"metrics.{name}: unknown key '{next(iter(options))}': {nearest('', ['features'])}")
    return None if name in MEASURED_BY else feature_network(named(features))


def _real(rules: ProtocolFile) -> Real:
    said = rules.reference
    if said is None:
        return Real()
    if not isinstance(said, ReferenceSpec):
        return _of_source(rules, said)
    what = "reference statistics" if said.path.endswith(STATISTICS) else "reference images"
    place = rules.need(said.path, what, said.fetch, "--reference")
    if place.is_file():
        check_sha256(place, said.sha256, f"{rules.name}: reference")
        return Real(statistics=place)
    files, _ = list_images(place)
    if said.count is not None and len(files) != said.count:
        raise UserError(
            f"{rules.name}: '{place}' has {len(files):,} images, not {said.count:,}: {said.fetch or 'fetch them anew'}"
        )
    return _of_folder(rules, place, Pictures(files))


def _of_folder(rules: ProtocolFile, place: Path, pictures: Pictures) -> Real:
    seen: list[str] = []  # digests of the pictures, taken while they pass

    def blocks() -> Blocks:
        digests: list[str] = []
        for rows, images in pictures.blocks(rules.resize):
            digests += map(pixel_digest, images)
            yield rows, images
        seen[:] = digests

    def words() -> str:
        if not seen:
            for _ in blocks():
                pass
        return f"{place.name} n={len(pictures)} sha256={digest(*seen)[:16]}"

    return Real(blocks, words=words)


def _of_source(rules: ProtocolFile, said: Mapping[str, Any]) -> Real:
    reference = load_reference(said)
    if reference is None or reference.images is None:
        raise UserError(f"{rules.name}: reference {dict(said)} has no images: name a source that has, e.g. digits")
    images, resize = reference.images, rules.resize

    def blocks() -> Blocks:
        for start in range(0, len(images), ROWS):
            part = images[start : start + ROWS]
            yield slice(start, start + ROWS), part if resize is None else torch.stack([fitted(x, resize) for x in part])

    return Real(blocks, words=lambda: reference.name)


def _finite(values: Tensor, name: str, pictures: Pictures, rows: slice) -> Tensor:
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        raise UserError(f"{name} of '{pictures.files[rows.start + int(bad[0])]}' is not finite: look at that picture")
    return values


def _joined(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(list(found)) for name, found in parts.items() if found}


def _all(blocks: Blocks) -> Tensor:
    return torch.cat([images for _, images in blocks])
