"""The images that are scored: drawn from an exported pipeline, or read from a folder; and what is written of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.captions import TABLE, captioned
from ..data.image_folder import decode, list_images
from ..errors import UserError
from .manifest import (
    MANIFEST,
    METRICS_FILE,
    Sample,
    Score,
    read_manifest,
    samples_of,
    write_images,
    write_manifest,
    write_scores,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """uint8 images [n, C, H, W], and the labels [n] or prompts (n texts) asked for, or None.

    facts: how a pipeline made them (`nfe`, `ms_per_image`, `steps`, `timesteps`, `scheduler`, `guidance`); empty for
    images from elsewhere.
    """

    images: Tensor
    labels: Tensor | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] | None = None


def is_pipeline(folder: Path) -> bool:
    """Whether `folder` is a model; else it is taken for images. UserError when it does not exist."""
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}': give an exported model or a folder of images")
    return (folder / "model_index.json").exists() or (folder / "fewstep.json").exists()


def draw(
    folder: Path,
    n: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    batch: int | None,
    prompts: Sequence[str] | None = None,
) -> Made:
    """n images of the pipeline in `folder`; image i is a function of (seed, i). None: the model's own steps.

    prompts: what a text-to-image model draws; other models are given none.
    """
    from ..exporting.network import takes_prompts
    from ..exporting.pipeline import generate, load_pipeline

    pipeline = load_pipeline(folder)
    texts = prompts if takes_prompts(pipeline) else None
    if takes_prompts(pipeline) and not texts:
        raise UserError(
            f"'{folder}' draws what prompts say: give a reference with captions, or {{source: prompts, ...}}"
        )
    made = generate(pipeline, n, seed=seed, steps=steps, guidance=guidance, batch=batch, prompts=texts)
    timesteps = [float(t) for t in made.timesteps]
    facts = {
        "nfe": made.nfe,
        "ms_per_image": made.ms_per_image,
        "steps": len(timesteps),
        "timesteps": timesteps,
        "scheduler": made.scheduler,
        "guidance": made.guidance,
    }
    return Made(made.images, made.labels, facts, made.prompts)


def read_images(folder: Path, n: int | None = None) -> Made:
    """n images (None: all) of `folder`, or of `folder/images`; labels from class folders, else from manifest.jsonl.

    Prompts come from manifest.jsonl, else from captions beside the images, as the data source `captions` reads them. A
    cut takes the first n by name, or of class folders an equal share of each.
    """
    root = folder / "images" if (folder / "images").is_dir() else folder
    files, names = list_images(root)
    n = n or len(files)
    if n > len(files):
        raise UserError(f"'{root}' has {len(files)} images, not {n}: lower n")
    files = [files[i * len(files) // n] for i in range(n)] if names else files[:n]
    if names:
        return Made(stacked(files), torch.tensor([names.index(file.parent.name) for file in files]))
    asked = _manifest(folder / MANIFEST, n)
    labels, prompts = _known([sample.label for sample in asked]), _known([sample.prompt for sample in asked])
    numbers = torch.tensor(labels) if labels else None
    return Made(stacked(files), numbers, prompts=prompts or _captions(root, files))


def write_run(made: Made, scores: Sequence[Score], out: Path, seed: int) -> None:
    """Writes metrics.json, and for drawn images also the images and manifest.jsonl, into `out`."""
    if made.facts:
        shared = {key: made.facts[key] for key in ("nfe", "guidance", "scheduler")}
        write_images(made.images, out / "images")
        timesteps = tuple(made.facts["timesteps"])
        samples = samples_of(made.images, made.labels, seed, timesteps=timesteps, **shared)
        if made.prompts is not None:
            samples = [replace(sample, prompt=text) for sample, text in zip(samples, made.prompts)]
        write_manifest(samples, out / MANIFEST)
    write_scores(scores, out / METRICS_FILE)


def stacked(files: Sequence[Path], channels: int | None = None) -> Tensor:
    """uint8 [n, C, H, W] of pictures; channels: default those of the first. UserError when two differ in size."""
    channels = channels or channels_of(files[0])
    images = [read_picture(file, channels) for file in files]
    for file, image in zip(files, images):
        if image.shape != images[0].shape:
            sizes = [f"{x.shape[2]}x{x.shape[1]}" for x in (image, images[0])]
            raise UserError(
                f"'{file}' is {sizes[0]} and '{files[0]}' is {sizes[1]}: all images of a score have one size"
            )
    return torch.stack(images)


def read_picture(file: Path, channels: int) -> Tensor:
    """uint8 [C, H, W]; UserError when it cannot be decoded."""
    pixels = decode(file, None, channels)
    if pixels is None:
        raise UserError(f"cannot decode '{file}': remove it, or write it anew")
    return torch.from_numpy(pixels.copy())


def channels_of(file: Path) -> int:
    """1 for a grey picture, else 3."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return 1 if opened.mode in ("1", "L", "LA", "I", "I;16") else 3
    except OSError:
        return 3  # the reader says what is wrong with it


def _manifest(file: Path, n: int) -> list[Sample]:
    """The first n samples, or none when there are not so many."""
    found = sorted(read_manifest(file), key=lambda s: s.index)[:n] if file.exists() else []
    return found if len(found) == n else []


def _known(values: Sequence[T | None]) -> list[T] | None:
    known = [value for value in values if value is not None]
    return known if known and len(known) == len(values) else None


def _captions(root: Path, files: Sequence[Path]) -> list[str] | None:
    if not (root / TABLE).is_file() and not all(file.with_suffix(".txt").is_file() for file in files):
        return None
    texts = dict(captioned(root))
    return _known([texts.get(file) for file in files])
