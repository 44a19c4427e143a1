"""A folder of pictures as a source; class sub-folders become labels."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from .images import Images
from .source import SourceConfig

if TYPE_CHECKING:
    from ..draws import Draw

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ORIENTATION = 0x0112  # the EXIF entry
SIDEWAYS = (5, 6, 7, 8)  # its values that change width and height over


class ImageFolderConfig(SourceConfig):
    """`{source: image_folder, path: photos, size: 64, flip: true}`."""

    path: str
    size: int = Field(gt=0, description="side of the centre-cropped, resized square")
    channels: Literal[1, 3] = 3
    flip: bool = Field(default=False, description="mirror half of the rows in training")
    skip_corrupt: bool = Field(default=False, description="leave out images that cannot be decoded, with a warning")


class ImageFolder(Images):
    """All pictures of a folder, or of its class sub-folders (label = rank of the sub-folder's name), decoded once.

    Kept in memory: count * channels * size^2 bytes. `files` are the pictures served, `skipped` those that were not.
    """

    Config = ImageFolderConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        found, names = list_images(Path(self.config.path))
        decoded = [(file, self._decode(file)) for file in found]
        self.files = [file for file, image in decoded if image is not None]
        self.skipped = [file for file, image in decoded if image is None]
        self._report(len(found))
        pixels = torch.from_numpy(np.stack([image for _, image in decoded if image is not None]))
        labels = torch.tensor([names.index(file.parent.name) for file in self.files]) if names else None
        self.hold(pixels, labels, classes=len(names) or None)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`x0` and `cond`; with `flip` and a draw, a row is mirrored with probability 1/2."""
        rows = super().fetch(ids, draw)
        if self.config.flip and draw is not None:
            mirror = draw.choice("flip", 0.5).to(rows["x0"].device)
            rows["x0"] = torch.where(mirror[:, None, None, None], rows["x0"].flip(-1), rows["x0"])
        return rows

    def _decode(self, file: Path) -> np.ndarray | None:
        image = decode(file, self.config.size, self.config.channels)
        if image is None and not self.config.skip_corrupt:
            raise UserError(f"image_folder: cannot decode '{file}': remove it, or set `skip_corrupt: true`")
        return image

    def _report(self, found: int) -> None:
        if not self.files:
            raise UserError(f"image_folder: none of the {found} images in '{self.config.path}' can be decoded")
        if self.skipped:
            warnings.warn(
                f"image_folder: left out {len(self.skipped)} of {found} images that cannot be decoded, "
                f"the first is '{self.skipped[0]}'",
                stacklevel=3,
            )


def list_images(folder: Path) -> tuple[list[Path], list[str]]:
    """(pictures, class names), sorted by name. No class names when the pictures lie in the folder itself.

    Raises UserError when there is no such folder, no picture, or pictures on both levels.
    """
    if not folder.is_dir():
        raise UserError(f"image_folder: no folder '{folder}': set `path` to a folder of png, jpg or webp files")
    inside = _pictures(folder)
    classes = {sub.name: _pictures(sub) for sub in sorted(folder.iterdir()) if sub.is_dir()}
    classes = {name: files for name, files in classes.items() if files}
    if inside and classes:
        raise UserError(f"image_folder: '{folder}' holds pictures beside class folders ('{inside[0].name}'): move them")
    if not inside and not classes:
        raise UserError(f"image_folder: '{folder}' is empty: no {', '.join(s[1:] for s in SUFFIXES)} file in it")
    return inside or [file for files in classes.values() for file in files], list(classes)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())


def decode(file: Path | BinaryIO, size: int | tuple[int, int] | None, channels: int) -> np.ndarray | None:
    """uint8 [channels, height, width] of a picture, cut around its centre and resized by antialiased bicubic.

    size: (height, width), or the side of a square, or None for the whole picture, unresized. None when it cannot be
    decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except _broken():
        return None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=_centre(image.size, height, width))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def shape_of(file: Path | BinaryIO) -> tuple[int, int] | None:
    """(height, width) of a picture as `decode` turns it, from its header alone. None when the header is broken."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) in SIDEWAYS
            return opened.size if turned else opened.size[::-1]
    except _broken():
        return None


def _broken() -> tuple[type[Exception], ...]:
    """What Pillow raises at files that are no pictures."""
    from PIL import Image

    return OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError


def _centre(size: tuple[int, int], height: int, width: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest box of the aspect width : height around the centre of a (w, h) picture."""
    full_width, full_height = size
    across, down = float(full_width), full_width * height / width
    if down > full_height:
        across, down = full_height * width / height, float(full_height)
    left, top = (full_width - across) // 2, (full_height - down) // 2
    return left, top, left + across, top + down
