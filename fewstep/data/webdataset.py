"""Captioned pictures in tar shards, as WebDataset packs them, read in any order."""

from __future__ import annotations

import glob
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ..errors import UserError, nearest
from .pictures import Pictures, PicturesConfig, report_skipped
from .source import digest
from .tar_index import TarIndex, open_index, write_index


class WebDatasetConfig(PicturesConfig):
    """`{source: webdataset, path: "shards/train-*.tar", size: 512}`."""

    path: str = Field(description="shards: a glob, a file, or a folder of .tar files")
    caption: str = Field(default="caption", description="key of the caption in .json members")
    index: str | None = Field(default=None, description="file of the index; default: beside the first shard")


class WebDataset(Pictures):
    """Rows are those of `Pictures`; samples come in the order of the shards' names and of the pictures in them.

    A sample is a picture (png, jpg, webp) with a caption of the same name up to the first dot: a .txt, or else a .json
    object with the caption under `caption`. Where members lie is written into an index once, so that row i is read
    directly and a resumed run goes on exactly. Shards are plain .tar files.

    Without `skip_corrupt` a sample without caption and a shard that is cut off are errors at the start, a picture that
    cannot be decoded when it is fetched. With it all pictures are decoded once, and the index says which are sound.
    """

    Config = WebDatasetConfig
    kind = "webdataset"

    def __init__(self, **config: Any):
        super().__init__(**config)
        shards = find_shards(self.config.path)
        file = Path(self.config.index) if self.config.index else _beside(shards)
        found = open_index(shards, file)
        self.index = found.all()
        if not len(self.index):
            raise UserError(f"webdataset: no picture in the {len(shards)} shards of '{self.config.path}'")
        if self.config.skip_corrupt:
            self._leave_out(found, file)
        else:
            self._refuse()
        self.hold()

    def __len__(self) -> int:
        return len(self.index)

    def picture(self, i: int) -> bytes:
        """The member's bytes."""
        return self.index.read(i, "picture")

    def caption(self, i: int) -> str:
        """Of the .txt or .json member; UserError when there is none, naming the nearest key."""
        if not self.index.has_text(i):
            raise UserError(
                f"webdataset: '{self.called(i)}' has no .txt or .json beside its picture: add one, or set "
                "`skip_corrupt: true`"
            )
        try:
            text = self.index.read(i, "text").decode()
        except UnicodeDecodeError:
            raise UserError(f"webdataset: the caption of '{self.called(i)}' is not UTF-8: convert it") from None
        return self._entry(i, text) if self.index.is_json[self.index.kept[i]] else text.strip()

    def called(self, i: int) -> str:
        """Shard and name in it."""
        return self.index.name(i)

    def content_key(self) -> str:
        """Digest of captions, sizes, and names, lengths and times of pictures: their bytes would take a pass each start."""
        return digest(self._said(), self.config.caption, self.index.content, self.index.kept.numpy().tobytes())

    def _entry(self, i: int, text: str) -> str:
        key = self.config.caption
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise UserError(f"webdataset: the .json of '{self.called(i)}' is no object: correct it")
        if not isinstance(said.get(key), str):
            hint = nearest(key, [k for k, v in said.items() if isinstance(v, str)])
            raise UserError(f"webdataset: the .json of '{self.called(i)}' has no text '{key}': set `caption`; {hint}")
        return said[key]

    def _refuse(self) -> None:
        """UserError for what can be seen without reading pictures."""
        if self.index.cut:
            raise UserError(
                f"webdataset: the shard '{self.index.cut[0]}' is cut off within a member: fetch it anew, or set "
                "`skip_corrupt: true`"
            )
        bare = (self.index.text[self.index.kept, 1] < 0).nonzero()
        self.caption(int(bare[0]) if len(bare) else 0)

    def _leave_out(self, found: TarIndex, file: Path) -> None:
        """Takes unusable samples out of the index: decodes all of them, unless `found` says which they are."""
        n, cut = len(self.index), self.index.cut
        if found.checked != self.config.caption:
            self.index = self.index.only(self.sound(n), self.config.caption)
            write_index(self.index, file)
        elif len(found) < n:
            first = next(i for i, k in enumerate([*found.kept.tolist(), n]) if i != k)
            report_skipped(self.kind, n - len(found), n, self.called(first))
            self.index = found
        if cut:
            warnings.warn(
                f"webdataset: {len(cut)} of {len(self.index.shards)} shards are cut off within a member, the first is "
                f"'{cut[0]}': what comes before that is served",
                stacklevel=4,
            )


def find_shards(path: str) -> list[Path]:
    """The shards of a glob, a file, or a folder, sorted by name. UserError when there are none."""
    found = sorted(Path(path).glob("*.tar")) if Path(path).is_dir() else sorted(map(Path, glob.glob(path)))
    if not found:
        raise UserError(
            f"webdataset: no shard '{path}': set `path` to a glob such as 'shards/train-*.tar', or a folder"
        )
    return found


def _beside(shards: Sequence[Path]) -> Path:
    names = digest(*(shard.name for shard in shards))[:8]  # other shards of the folder have an index of their own
    return shards[0].parent / f"fewstep-index-{names}.safetensors"
