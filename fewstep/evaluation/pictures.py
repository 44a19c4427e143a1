"""Pictures on disk that are scored: found, held against their manifest, resized, and read a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.image_folder import SUFFIXES, list_images
from ..errors import UserError
from .drawing import IMAGES, picture
from .manifest import MANIFEST, Sample, pixel_digest, read_manifest
from .prompt_sets import PromptSet
from .protocols import ResizeSpec
from .samples import channels_of, read_picture

ROWS = 64  # in one block; bounds memory


@dataclass(frozen=True)
class Pictures:
    """Files in order; labels [n] or None; samples: their manifest's lines, or None for pictures from elsewhere."""

    files: Sequence[Path]
    labels: Tensor | None = None
    samples: Sequence[Sample] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def blocks(self, resize: ResizeSpec | None, rows: int = ROWS) -> Iterator[tuple[slice, Tensor]]:
        """(rows, uint8 images [rows, C, H, W]), resized.

        UserError for a picture that cannot be decoded, is not that of the manifest, or differs from its block in size.
        """
        channels = channels_of(self.files[0])
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            images = [self._image(i, channels, resize) for i in range(*part.indices(len(self)))]
            other = next((i for i, x in enumerate(images) if x.shape != images[0].shape), None)
            if other is not None:
                raise UserError(
                    f"'{self.files[start + other]}' is {_size(images[other])} and '{self.files[start]}' {_size(images[0])}: "
                    "give pictures of one size, or set `resize` in the protocol"
                )
            yield part, torch.stack(images)

    def _image(self, i: int, channels: int, resize: ResizeSpec | None) -> Tensor:
        image = read_picture(self.files[i], channels)
        if self.samples is not None and pixel_digest(image) != self.samples[i].sha256:
            raise UserError(f"'{self.files[i]}' is not the picture of its manifest: remove the file and draw it anew")
        return image if resize is None else fitted(image, resize)


def fitted(image: Tensor, resize: ResizeSpec) -> Tensor:
    """uint8 [C, size, size] of uint8 [C, H, W]: cut to the middle square, then resized by Pillow, which antialiases."""
    from PIL import Image

    height, width = image.shape[-2:]
    if (height, width) == (resize.size, resize.size):
        return image
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    cut = image[:, top : top + short, left : left + short].numpy()
    pixels = Image.fromarray(cut[0] if len(cut) == 1 else np.ascontiguousarray(cut.transpose(1, 2, 0)))
    made = np.asarray(pixels.resize((resize.size, resize.size), Image.Resampling[resize.filter.upper()]))
    return torch.from_numpy(made[None].copy() if len(cut) == 1 else made.transpose(2, 0, 1).copy())


def find_pictures(folder: Path, prompts: PromptSet | None, n: int | None) -> Pictures:
    """The pictures of a protocol's prompts (None: n of the folder, or all) in a folder that is no model.

    A folder with a manifest is held against it; else pictures are called as the benchmark calls them (`photo/00000.jpg`),
    or lie in the folder in the order of the prompts. UserError names the first that is missing or of another prompt.
    """
    if (folder / MANIFEST).is_file():
        return _of_manifest(folder, prompts, n)
    if prompts is not None and prompts.names is not None and len(set(prompts.names)) == len(prompts):
        return Pictures([_named(folder, name) for name in prompts.names])
    root = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    files, names = list_images(root)
    wanted = len(prompts) if prompts is not None else (n or len(files))
    if wanted > len(files) or (prompts is not None and wanted < len(files) and n is None):
        raise UserError(
            f"'{root}' has {len(files)} pictures, the protocol {wanted}: give one for each prompt, or set --n"
        )
    chosen = [files[i * len(files) // wanted] for i in range(wanted)] if names else files[:wanted]
    labels = torch.tensor([names.index(file.parent.name) for file in chosen]) if names and prompts is None else None
    return Pictures(chosen, labels)


def pictures_of(folder: Path, samples: Sequence[Sample]) -> Pictures:
    """The pictures of manifest lines. UserError names the first that is missing."""
    files = [picture(folder, sample.index) for sample in samples]
    gone = [file for file in files if not file.is_file()]
    if gone:
        raise UserError(
            f"{MANIFEST} names {len(gone)} pictures that are not there, the first '{gone[0]}': draw them with "
            "`fewstep evaluate MODEL --protocol ... --out` of that folder"
        )
    labels = [sample.label for sample in samples if sample.label is not None]
    return Pictures(files, torch.tensor(labels) if len(labels) == len(samples) else None, samples)


def _of_manifest(folder: Path, prompts: PromptSet | None, n: int | None) -> Pictures:
    known = {sample.index: sample for sample in read_manifest(folder / MANIFEST)}
    wanted = len(prompts) if prompts is not None else (n or len(known))
    missing = next((i for i in range(wanted) if i not in known), None)
    if missing is not None:
        raise UserError(
            f"'{folder / MANIFEST}' has no line for image {missing} of {wanted}: draw the rest with --out, or lower --n"
        )
    samples = [known[i] for i in range(wanted)]
    for sample, text in zip(samples, prompts.texts if prompts is not None else ()):
        if sample.prompt != text:
            raise UserError(
                f"'{folder}': image {sample.index} shows '{sample.prompt}', the protocol's prompt is '{text}': "
                "choose the protocol that it was drawn for"
            )
    return pictures_of(folder, samples)


def _named(folder: Path, name: str) -> Path:
    found = next((file for end in SUFFIXES if (file := folder / f"{name}{end}").is_file()), None)
    if found is None:
        raise UserError(f"no picture '{folder / name}' ({', '.join(SUFFIXES)}): the protocol has a prompt of that name")
    return found


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
