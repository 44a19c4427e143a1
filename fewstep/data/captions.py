"""A folder of pictures with a caption each; pictures are decoded when they are fetched, so that thousands fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from .batch import Cond
from .image_folder import decode, list_images
from .source import Source, SourceConfig, digest

if TYPE_CHECKING:
    from ..draws import Draw

TABLE = "metadata.jsonl"
KEYS = ("text", "caption")
WORKERS = 8  # pictures decoded at once


class CaptionsConfig(SourceConfig):
    """`{source: captions, path: photos, size: 512}`."""

    path: str
    size: int = Field(gt=0, description="side of the centre-cropped, resized square")
    flip: bool = Field(default=False, description="mirror half of the rows in training")
    skip_corrupt: bool = Field(default=False, description="leave out images that cannot be decoded, with a warning")


class Captions(Source):
    """Rows `x0` [n, 3, size, size], the captions as `prompt` (a list), and an empty `cond` until a family fills it.

    Captions stand in `metadata.jsonl`, a line `{"file_name": "a.png", "text": "..."}` a picture (Hugging Face's
    imagefolder; the key may be `caption`), or in `a.txt` beside `a.png`. Samples come in the order of the table's lines
    (a picture that it does not list is left out), or of file names. A picture that cannot be decoded raises UserError
    when it is fetched; `skip_corrupt` decodes all of them once at the start and leaves out those that fail. `files` are
    the pictures served.
    """

    Config = CaptionsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        pairs = captioned(Path(self.config.path))
        if self.config.skip_corrupt:
            pairs = self._sound(pairs)
        self.files, self.prompts = [file for file, _ in pairs], [text for _, text in pairs]
        self.row_shape = (3, self.config.size, self.config.size)

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`x0`, `cond`, `prompt`; with `flip` and a draw, a picture is mirrored with probability 1/2."""
        chosen = ids.tolist()
        with ThreadPoolExecutor(WORKERS) as pool:  # decoding and resizing run outside of Python's lock
            pixels = np.stack(list(pool.map(self._pixels, [self.files[i] for i in chosen])))
        x0 = torch.from_numpy(pixels).to(torch.float32).mul_(2 / 255).sub_(1)
        if self.config.flip and draw is not None:
            x0 = torch.where(draw.choice("flip", 0.5).cpu()[:, None, None, None], x0.flip(-1), x0)
        return {"x0": x0, "cond": Cond(), "prompt": [self.prompts[i] for i in chosen]}

    def content_key(self) -> str:
        """Digest of the files' bytes, the captions and the size."""
        return self._key

    @cached_property
    def _key(self) -> str:
        files = (digest(file.read_bytes()) for file in self.files)
        return digest(f"captions {self.config.size}", *files, *self.prompts)

    def _pixels(self, file: Path) -> np.ndarray:
        image = decode(file, self.config.size, 3)
        if image is None:
            raise UserError(f"captions: cannot decode '{file}': remove it, or set `skip_corrupt: true`")
        return image

    def _sound(self, pairs: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
        """The pairs whose picture can be decoded, with a warning that counts the others."""
        kept = [pair for pair in pairs if decode(pair[0], 1, 3) is not None]
        if not kept:
            raise UserError(f"captions: none of the {len(pairs)} images in '{self.config.path}' can be decoded")
        if len(kept) < len(pairs):
            first = next(pair[0] for pair in pairs if pair not in kept)
            warnings.warn(
                f"captions: left out {len(pairs) - len(kept)} of {len(pairs)} images that cannot be decoded, "
                f"the first is '{first}'",
                stacklevel=4,
            )
        return kept


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of every sample in a folder.

    UserError when there is no such folder or no picture, or a picture lacks its caption or a caption its picture.
    """
    if not folder.is_dir():
        raise UserError(f"captions: no folder '{folder}': set `path` to a folder of pictures with captions")
    return _from_table(folder / TABLE) if (folder / TABLE).is_file() else _from_neighbours(list_images(folder)[0])


def _from_table(table: Path) -> list[tuple[Path, str]]:
    lines = _text(table).split("\n")
    pairs = [_entry(table, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise UserError(f"captions: '{table}' is empty: write a line a picture, or remove it and use .txt files")
    missing = next((file for file, _ in pairs if not file.is_file()), None)
    if missing is not None:
        raise UserError(f"captions: '{table}' names '{missing.name}', which is not there: remove the line")
    return pairs


def _entry(table: Path, number: int, line: str) -> tuple[Path, str]:
    where = f"captions: line {number} of '{table}'"
    try:
        said = json.loads(line)
        name = said["file_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{where} is no {{"file_name": ..., "text": ...}}: correct it') from None
    caption = next((said[key] for key in KEYS if isinstance(said.get(key), str)), None)
    if caption is None:
        raise UserError(f"{where} has no caption for '{name}': write it as `text` or `caption`")
    return table.parent / name, caption


def _from_neighbours(files: Sequence[Path]) -> list[tuple[Path, str]]:
    bare = next((file for file in files if not file.with_suffix(".txt").is_file()), None)
    if bare is not None:
        raise UserError(f"captions: '{bare}' has no caption: write '{bare.stem}.txt' beside it, or list it in {TABLE}")
    return [(file, _text(file.with_suffix(".txt")).strip()) for file in files]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"captions: '{file}' is not UTF-8: convert it") from None
