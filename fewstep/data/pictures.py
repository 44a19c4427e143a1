"""Pictures with a caption each, wherever they lie: decoded when they are fetched, so that any number fits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from .aspect import bucket_sizes, nearest_bucket
from .batch import Cond
from .encoded import CacheConfig
from .image_folder import decode, shape_of
from .source import Source, digest

if TYPE_CHECKING:
    from ..draws import Draw

WORKERS = 8  # pictures decoded at once
T = TypeVar("T")


class PicturesConfig(CacheConfig):
    """What a recipe may write of any source of captioned pictures."""

    size: int = Field(gt=0, description="side of the centre-cropped, resized square")
    flip: bool = Field(default=False, description="mirror half of the rows in training")
    skip_corrupt: bool = Field(default=False, description="leave out images that cannot be decoded, with a warning")
    buckets: bool = Field(default=False, description="train on sizes of equal area, each picture in the nearest")
    multiple: int = Field(default=64, gt=0, description="of which the sides of all buckets are multiples")


class Pictures(Source):
    """Rows `x0` [n, 3, height, width], the captions as `prompt` (a list), and an empty `cond` until a family fills it.

    Subclasses set `kind`, write `picture`, `caption` and `called`, and end their constructor with `hold`.

    Without buckets every row is the centre square of side `size`. With `buckets: true` a fetch with a draw (training)
    gives every picture in its bucket's size, all ids of one bucket, as the feed draws them; a fetch without (validation,
    previews) still gives centre squares. `buckets` [N] are the samples' buckets, `sizes` the (height, width) of each.
    """

    kind: ClassVar[str]  # what errors begin with
    sizes: Sequence[tuple[int, int]]

    def picture(self, i: int) -> Path | bytes:
        """File or encoded bytes of sample i."""
        raise NotImplementedError

    def caption(self, i: int) -> str:
        """The caption of sample i; UserError when it has none."""
        raise NotImplementedError

    def called(self, i: int) -> str:
        """What to call sample i in a message."""
        raise NotImplementedError

    def sound(self, n: int) -> list[int]:
        """Which of the samples 0 .. n-1 can be decoded and have a caption; a warning counts the others."""
        kept = [i for i, good in enumerate(_each(self._is_sound, range(n))) if good]
        if not kept:
            raise UserError(f"{self.kind}: none of the {n} images in '{self.config.path}' can be decoded")
        if len(kept) < n:
            first = next(i for i, k in enumerate([*kept, n]) if i != k)
            report_skipped(self.kind, n - len(kept), n, self.called(first))
        return kept

    def hold(self) -> None:
        """Fixes what rows look like, once the samples are known."""
        self.row_shape = (3, self.config.size, self.config.size)
        self.sizes = [(self.config.size, self.config.size)]
        if self.config.buckets:
            self.sizes = bucket_sizes(self.config.size, self.config.multiple)
            self.buckets = nearest_bucket(_each(self._shape, range(len(self))), self.sizes)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`x0`, `cond`, `prompt`; with `flip` and a draw, a picture is mirrored with probability 1/2."""
        x0 = self.pixels(ids, self.size_of(ids) if draw is not None else self.sizes[0])
        mirrored = self.mirrored(draw)
        if mirrored is not None:
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return {"x0": x0, "cond": Cond(), "prompt": self.prompts_of(ids)}

    def prompts_of(self, ids: Tensor) -> list[str]:
        """The captions of these samples."""
        return [self.caption(i) for i in ids.tolist()]

    def pixels(self, ids: Tensor, size: tuple[int, int]) -> Tensor:
        """The pictures in [-1, 1], unmirrored, [n, 3, *size]."""
        rows = np.stack(_each(lambda i: self._decoded(i, size), ids.tolist()))
        return torch.from_numpy(rows).to(torch.float32).mul_(2 / 255).sub_(1)

    def mirrored(self, draw: Draw | None) -> Tensor | None:
        """Which rows a fetch with this draw mirrors, bool [n] on the host; None where nothing is mirrored."""
        return draw.choice("flip", 0.5).cpu() if self.config.flip and draw is not None else None

    def size_of(self, ids: Tensor) -> tuple[int, int]:
        """(height, width) of the one bucket of all these samples. UserError when there are several."""
        if self.buckets is None:
            return self.sizes[0]
        found = self.buckets[ids].unique()
        if len(found) > 1:
            raise UserError(
                f"{self.kind}: pictures of {len(found)} buckets cannot stand in one batch: an offline stage and groups of "
                "samples need `buckets: false`"
            )
        return self.sizes[int(found)]

    def content_key(self) -> str:
        """Digest of the pictures' bytes, the captions and the sizes."""
        return self._key

    @cached_property
    def _key(self) -> str:
        ids = range(len(self))
        return digest(self._said(), *(digest(_bytes(self.picture(i))) for i in ids), *(self.caption(i) for i in ids))

    def _said(self) -> str:
        """What of the config decides on rows."""
        buckets = f" {self.config.multiple}" if self.config.buckets else ""
        return f"{self.kind} {self.config.size}{buckets}"

    def _is_sound(self, i: int) -> bool:
        try:
            self.caption(i)
        except UserError:
            return False
        return decode(_opened(self.picture(i)), 1, 3) is not None

    def _decoded(self, i: int, size: tuple[int, int]) -> np.ndarray:
        found = decode(_opened(self.picture(i)), size, 3)
        return self._known(found, i)

    def _shape(self, i: int) -> tuple[int, int]:
        return self._known(shape_of(_opened(self.picture(i))), i)

    def _known(self, found: T | None, i: int) -> T:
        if found is None:
            raise UserError(f"{self.kind}: cannot decode '{self.called(i)}': remove it, or set `skip_corrupt: true`")
        return found


def report_skipped(kind: str, skipped: int, n: int, first: str) -> None:
    """Warns how many of n samples were left out."""
    warnings.warn(
        f"{kind}: left out {skipped} of {n} images that cannot be decoded or lack a caption, the first is '{first}'",
        stacklevel=4,
    )


def _each(work: Callable[[int], T], samples: Sequence[int]) -> list[T]:
    """`work` of every sample, in order; reading, decoding and resizing run outside of Python's lock."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, samples))


def _opened(picture: Path | bytes) -> Path | BinaryIO:
    return io.BytesIO(picture) if isinstance(picture, bytes) else picture


def _bytes(picture: Path | bytes) -> bytes:
    return picture if isinstance(picture, bytes) else picture.read_bytes()
