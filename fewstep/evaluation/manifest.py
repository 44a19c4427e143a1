"""What is written beside generated images and scores, and the rule that only equal protocols are compared.

<out>/images/000000.png     the index is the image's number; image i is a function of (seed, i), whatever the batch
<out>/manifest.jsonl        a `Sample` a line
<out>/metrics.json          a list of `Score`s
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UserError

MANIFEST, METRICS_FILE = "manifest.jsonl", "metrics.json"


@dataclass(frozen=True)
class Sample:
    """How one image was made: from noise addressed by (seed, index).

    guidance is None where the pipeline takes none. sha256: of the pixels (uint8, [C, H, W]), not of the PNG file, whose
    bytes depend on the encoder.
    """

    index: int
    seed: int
    nfe: float
    guidance: float | None
    scheduler: str
    timesteps: tuple[float, ...]
    sha256: str
    prompt: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class Protocol:
    """Everything that must be equal before two values may be compared.

    n: generated images. impl, impl_version: of the metric, and of the feature network's code where it is foreign.
    features, weights_sha256: the feature network. resize: how images reach its size. reference: the real set, its size
    and digest.
    """

    metric: str
    n: int
    impl: str
    impl_version: str
    features: str
    weights_sha256: str
    resize: str
    reference: str


@dataclass(frozen=True)
class Score:
    """A value with its protocol; of a mean over images also the ends of its 95 % bootstrap interval."""

    value: float
    protocol: Protocol
    interval: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """Name for tables: the metric with its feature network, `fid[digits-cnn]`."""
        return f"{self.protocol.metric}[{self.protocol.features}]"

    def plain(self) -> dict[str, Any]:
        """The entry in metrics.json."""
        plain = {"metric": self.protocol.metric, "label": self.label, "value": self.value, **asdict(self.protocol)}
        return plain if self.interval is None else {**plain, "interval": list(self.interval)}


def compare(a: Score, b: Score) -> float:
    """b - a. UserError names the first field in which the two protocols differ."""
    same_protocol(asdict(a.protocol), asdict(b.protocol), f"{a.label} and {b.label}")
    return b.value - a.value


def same_protocol(a: Mapping[str, Any], b: Mapping[str, Any], what: str) -> None:
    """UserError names the first field in which two protocols differ."""
    for field in {**a, **b}:
        left, right = a.get(field), b.get(field)
        if left != right:
            raise UserError(
                f"{what} cannot be compared: {field} is '{left}' there and '{right}' here: score both under one protocol"
            )


def write_scores(scores: Iterable[Score], file: Path) -> None:
    """Writes metrics.json in one move; a file that is there is whole."""
    write_text(file, json.dumps([score.plain() for score in scores], indent=1) + "\n")


def read_scores(file: Path) -> list[Score]:
    """The inverse of `write_scores`."""
    names = [field.name for field in fields(Protocol)]
    try:
        entries = json.loads(file.read_text())
        return [Score(float(e["value"]), Protocol(**{name: e[name] for name in names}), _pair(e)) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' holds no scores of fewstep: {type(error).__name__}: {error}") from None


def write_manifest(samples: Iterable[Sample], file: Path) -> None:
    """Writes one JSON object a line; of `prompt` and `label` the one that is set."""
    write_text(file, "".join(map(line_of, samples)))


def line_of(sample: Sample) -> str:
    """The sample's line, with its end; of `prompt` and `label` the one that is set."""
    said = {k: v for k, v in asdict(sample).items() if v is not None or k not in ("prompt", "label")}
    return json.dumps(said, ensure_ascii=False) + "\n"


def read_manifest(file: Path) -> list[Sample]:
    """The inverse of `write_manifest`."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        return [Sample(**{**line, "timesteps": tuple(line["timesteps"])}) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is no manifest of fewstep: {type(error).__name__}: {error}") from None


def pixel_digest(image: Tensor) -> str:
    """sha256 of the pixels of one uint8 image [C, H, W]."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


def write_images(images: Tensor, folder: Path) -> list[Path]:
    """000000.png ... of uint8 images [n, 1 or 3, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:06d}.png" for index in range(len(images))]
    for file, image in zip(files, images):
        save_image(image, file)
    return files


def save_image(image: Tensor, file: Path) -> None:
    """A PNG file, whatever its name, of a uint8 image [1 or 3, H, W]."""
    from PIL import Image

    pixels = image.numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.save(file, format="PNG")


def samples_of(images: Tensor, labels: Tensor | None, seed: int, **shared: Any) -> Sequence[Sample]:
    """Manifest lines of images drawn in one go; `shared` are the fields that all of them have in common."""
    numbers: list[int | None] = [None] * len(images) if labels is None else [int(label) for label in labels]
    return [
        Sample(index=i, seed=seed, label=number, sha256=pixel_digest(images[i]), **shared)
        for i, number in enumerate(numbers)
    ]


def write_text(file: Path, text: str) -> None:
    """Writes the file in one move: what is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


def _pair(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    if entry.get("interval") is None:
        return None
    low, high = entry["interval"]
    return float(low), float(high)
