"""Image sources that live in memory as uint8 and are normalised to [-1, 1] at fetch."""

from __future__ import annotations

import gzip
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from ..resources import asset
from .batch import Cond
from .source import Source, SourceConfig, digest

if TYPE_CHECKING:
    from ..draws import Draw

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Images(Source):
    """Rows `x0` [n, channels, height, width] = 2 pixel / top - 1, and `cond.label` where there are labels.

    Subclasses call `hold` at the end of their constructor.
    """

    def hold(self, pixels: Tensor, labels: Tensor | None, *, top: int = 255, classes: int | None = None) -> None:
        """Keeps `pixels` [N, C, H, W] (uint8, 0..top) and `labels` [N] (any integer type)."""
        self.pixels, self.top = pixels, top
        self.labels = None if labels is None else labels.long()
        self.row_shape, self.classes = tuple(pixels.shape[1:]), classes

    def __len__(self) -> int:
        return len(self.pixels)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`x0` and `cond`; see `Source.fetch`. Nothing is random here."""
        x0 = self.pixels[ids].to(torch.float32).mul_(2 / self.top).sub_(1)
        return {"x0": x0, "cond": Cond() if self.labels is None else Cond(label=self.labels[ids])}

    def content_key(self) -> str:
        """Digest of pixels, labels and range."""
        return self._key

    @cached_property
    def _key(self) -> str:
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        return digest(self.pixels.numpy().tobytes(), labels, f"{tuple(self.pixels.shape)} {self.top}")


class Digits(Images):
    """1,797 handwritten digits [1, 8, 8], grey levels 0..16, ten classes (Alpaydin and Kaynak 1998; shipped)."""

    def __init__(self, **config: Any):
        super().__init__(**config)
        from safetensors.torch import load_file

        arrays = load_file(asset("digits/digits.safetensors"))
        self.hold(arrays["images"][:, None], arrays["labels"], top=16, classes=10)


class FashionMnistConfig(SourceConfig):
    """`{source: fashion_mnist, size: 16, split: train}`. Without `full` and `path`, the shipped subset."""

    size: Literal[28, 16] = 28
    split: Literal["train", "test"] = "train"
    full: bool = Field(default=False, description="all 60,000 + 10,000 images, from Debian's dataset-fashion-mnist")
    path: str | None = Field(default=None, description="folder of the four idx files, gzipped or not; implies full")


class FashionMnist(Images):
    """Garments [1, 28, 28] or [1, 16, 16], ten classes (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747).

    The shipped subset holds 10,000 training images, 1,000 a class, and the first 2,000 test images.
    """

    Config = FashionMnistConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        prefix = "train" if self.config.split == "train" else "t10k"
        folder = self._folder()
        pixels = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"))
        labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte"))
        images = torch.from_numpy(pixels)[:, None]
        if self.config.size != images.shape[-1]:
            images = area_resize(images, self.config.size)
        self.hold(images, torch.from_numpy(labels), classes=10)

    def _folder(self) -> Path:
        if self.config.path is not None:
            return Path(self.config.path)
        return _DEBIAN if self.config.full else asset("fashion_mnist")


def _find(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"fashion_mnist: no '{stem}.gz' in '{folder}': install the Debian package dataset-fashion-mnist "
        "(apt-get install dataset-fashion-mnist), or set `path` to a folder with the four idx files"
    )


def read_idx(file: Path) -> np.ndarray:
    """The uint8 array of an idx file (LeCun's format: two zero bytes, type 8, rank, big-endian sizes, bytes)."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if raw[:3] != b"\x00\x00\x08":
            raise ValueError("it is no idx file of bytes")
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"cannot read '{file}': {error}; fetch the file anew") from None


def area_resize(images: Tensor, size: int) -> Tensor:
    """[n, c, h, w] uint8 to [n, c, size, size]: a new pixel is the mean over the area it covers."""
    rows, columns = _overlaps(images.shape[-2], size), _overlaps(images.shape[-1], size)
    parts = [rows @ part.float() @ columns.T for part in images.split(4096)]
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def _overlaps(old: int, new: int) -> Tensor:
    """[new, old]: share of new pixel i (a stretch of old/new old pixels) that old pixel j fills."""
    edges = torch.arange(new + 1, dtype=torch.float64) * (old / new)
    pixel = torch.arange(old, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], pixel + 1)
    starts = torch.maximum(edges[:-1, None], pixel)
    return ((ends - starts).clamp(min=0) * (new / old)).float()


def to_uint8(x: Tensor) -> Tensor:
    """Pixels 0..255 of images in [-1, 1]; values outside are clipped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
