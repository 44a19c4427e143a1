"""What is written beside generated images and scores, and the rule that only equal protocols are compared.

<out>/images/000000.png     the index is the image's number; image i is a function of (seed, i), whatever the batch
<out>/manifest.jsonl        a `Sample` a line
<out>/metrics.json          a list of `Score`s
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
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
    """A value with its protocol."""

    value: float
    protocol: Protocol

    @property
    def label(self) -> str:
        """Name for tables: the metric with its feature network, `fid[digits-cnn]`."""
        return f"{self.protocol.metric}[{self.protocol.features}]"

    def plain(self) -> dict[str, Any]:
        """The entry in metrics.json."""
        return {"metric": self.protocol.metric, "label": self.label, "value": self.value, **asdict(self.protocol)}


def compare(a: Score, b: Score) -> float:
    """b - a. UserError names the first field in which the two protocols differ."""
    for field in fields(Protocol):
        left, right = getattr(a.protocol, field.name), getattr(b.protocol, field.name)
        if left != right:
            raise UserError(
                f"{a.label} and {b.label} cannot be compared: {field.name} is '{left}' there and '{right}' here: "
                "score both under one protocol"
            )
    return b.value - a.value


def write_scores(scores: Iterable[Score], file: Path) -> None:
    """Writes metrics.json in one move; a file that is there is whole."""
    _write(file, json.dumps([score.plain() for score in scores], indent=1) + "\n")


def read_scores(file: Path) -> list[Score]:
    """The inverse of `write_scores`."""
    names = [field.name for field in fields(Protocol)]
    try:
        entries = json.loads(file.read_text())
        return [Score(float(e["value"]), Protocol(**{name: e[name] for name in names})) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' holds no scores of fewstep: {type(error).__name__}: {error}") from None


def write_manifest(samples: Iterable[Sample], file: Path) -> None:
    """Writes one JSON object a line; of `prompt` and `label` the one that is set."""
    lines = [{k: v for k, v in asdict(s).items() if v is not None or k not in ("prompt", "label")} for s in samples]
    _write(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


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
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:06d}.png" for index in range(len(images))]
    for file, image in zip(files, images.numpy()):
        Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))).save(file)
    return files


def samples_of(images: Tensor, labels: Tensor | None, seed: int, **shared: Any) -> Sequence[Sample]:
    """Manifest lines of images drawn in one go; `shared` are the fields that all of them have in common."""
    numbers: list[int | None] = [None] * len(images) if labels is None else [int(label) for label in labels]
    return [
        Sample(index=i, seed=seed, label=number, sha256=pixel_digest(images[i]), **shared)
        for i, number in enumerate(numbers)
    ]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)
