"""Folders of images through a feature network in bounded memory: a batch of pixels and the moments, never all features.

network = feature_network("inception-clean")
reference = folder_statistics(Path("val2017"), network)
write_statistics(reference, Path("val2017.safetensors"))
frechet_distance(folder_moments(Path("images"), network), reference)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..data.image_folder import list_images
from ..errors import UserError
from .features import FeatureNetwork
from .fid import Moments
from .samples import channels_of, read_picture
from .statistics import Statistics

ROWS = 64  # images in one pass
_THREADS = min(8, os.cpu_count() or 1)


def folder_statistics(folder: Path, network: FeatureNetwork, rows: int = ROWS) -> Statistics:
    """`folder_moments` with the network's name, weights, resize chain and n, ready to be written."""
    return Statistics.of(folder_moments(folder, network, rows), network)


def folder_moments(folder: Path, network: FeatureNetwork, rows: int = ROWS) -> Moments:
    """Moments of the features of all images of a folder, `rows` at a time. Raises as `image_batches` does."""
    return streamed_moments(image_batches(folder, rows), network)


def streamed_moments(batches: Iterable[Tensor], network: FeatureNetwork) -> Moments:
    """Moments of the features of uint8 batches [*, C, H, W]. UserError when there is no batch."""
    moments: Moments | None = None
    for images in batches:
        features = network.features(images)
        moments = moments or Moments(features.shape[1])
        moments.update(features)
    if moments is None:
        raise UserError("no images: a score needs at least 2")
    return moments


def image_batches(folder: Path, rows: int = ROWS) -> Iterator[Tensor]:
    """uint8 batches [rows, C, H, W] of a folder's pictures, by name; the next is decoded meanwhile. C: as of the first.

    UserError for a folder without pictures, a file that is none, and a picture of another size than the first.
    """
    files, _ = list_images(folder)
    channels = channels_of(files[0])
    parts = [files[start : start + rows] for start in range(0, len(files), rows)]
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead = _decoding(pool, parts[0], channels)
        first: tuple[Path, tuple[int, ...]] | None = None
        for part, after in zip(parts, [*parts[1:], []]):
            now, ahead = list(ahead), _decoding(pool, after, channels)
            first = first or (part[0], now[0].shape)
            yield _stack(part, now, *first)


def _decoding(pool: ThreadPoolExecutor, files: Sequence[Path], channels: int) -> Iterator[Tensor]:
    return pool.map(lambda file: read_picture(file, channels), files)


def _stack(files: Sequence[Path], images: Sequence[Tensor], first: Path, shape: tuple[int, ...]) -> Tensor:
    for file, image in zip(files, images):
        if image.shape != shape:
            sizes = [f"{width}x{height}" for _, height, width in (image.shape, shape)]
            raise UserError(f"'{file}' is {sizes[0]} and '{first}' is {sizes[1]}: all images of a score have one size")
    return torch.stack(list(images))
