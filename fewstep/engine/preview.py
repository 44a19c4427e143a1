"""Sample grids as PNG files, and what a run shows of itself while it trains.

previews/step-N.png        the samples; of some kinds also step-N.html, a page that needs nothing beside it
previews/NAME/step-N.png   further pictures
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..methods.base import Method
from ..registry import Registry

# By `Method.draws`: f(method, samples, folder, step) writes files of samples into the folder.
ARTISTS = Registry(
    "artist",
    "fewstep.artists",
    {"images": "fewstep.engine.preview:draw_images", "chains": "fewstep.evaluation.protein.preview:draw_chains"},
)


PLAYED, STILLS = (".gif", ".webp"), 8  # files that play; frames of a video that a picture shows
FRAMES_A_SECOND = 16  # as Wan's videos have them


def grid(images: Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """Images [n, C, H, W] in [-1, 1] or uint8 as one picture; small ones are enlarged so that a cell has 48 pixels or more."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    n, channels, height, width = pixels.shape
    scale = scale or max(1, -(-48 // height))
    rows = -(-n // columns)
    canvas = np.zeros((rows * (height * scale + 2), columns * (width * scale + 2), channels), np.uint8) + 32
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        y, x = (i // columns) * (height * scale + 2), (i % columns) * (width * scale + 2)
        canvas[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas[..., :3])


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded and clipped as diffusers' pipelines do."""
    return ((images.detach().float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def save_grid(images: Tensor, file: Path, columns: int = 10) -> Path:
    """Writes a grid, making the folder when needed; of videos [n, C, frames, H, W] a row each, of at most `STILLS` frames.

    A file that ends in one of `PLAYED` plays videos beside each other, all frames of them.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if images.ndim == 5 and file.suffix in PLAYED:
        first, *others = (grid(frames, columns) for frames in images.unbind(2))
        first.save(file, save_all=True, append_images=others, duration=1000 / FRAMES_A_SECOND, loop=0)
        return file
    if images.ndim == 5:
        columns = min(images.shape[2], STILLS)
        shown = torch.linspace(0, images.shape[2] - 1, columns).round().long()
        images = images[:, :, shown].transpose(1, 2).flatten(0, 1)
    grid(images, columns).save(file)
    return file


@torch.no_grad()
def write_previews(method: Method, rows: int, seed: int, folder: Path, step: int) -> Tensor | None:
    """Has the method's samples drawn, and writes NAME/step-N.png of each further picture. Returns the samples.

    None: the method does not generate.
    """
    file = f"step-{step:06d}.png"
    for caption, images in method.pictures(rows, seed).items():
        save_grid(images, folder / slug(caption) / file)
    samples = method.samples(rows, seed)
    if samples is not None:
        ARTISTS.get(method.draws)(method, samples, folder, step)
    return samples


def draw_images(_method: Method, samples: Tensor, folder: Path, step: int) -> None:
    """Writes step-N.png of samples that are images or videos of one or three channels, and nothing of others."""
    if samples.ndim in (4, 5) and samples.shape[1] in (1, 3):
        save_grid(samples, folder / f"step-{step:06d}.png")


def slug(caption: str) -> str:
    """A caption as a folder's name, "negative time" -> "negative-time"."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")
