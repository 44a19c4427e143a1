"""Where samples lie in tar shards, so that any one can be read without reading those before it.

A sample is what shares a name up to its first dot: `000123.jpg` with `000123.txt` or `000123.json`, as WebDataset packs
them. Reading the headers of all members takes a while, so the index is kept in a safetensors file beside the shards, and
made anew when a shard's name, size or time changes.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import RunFailed, UserError
from .image_folder import SUFFIXES
from .source import digest

FORMAT = "1"
TEXTS = (".txt", ".json")  # in the order of preference
BLOCK = 512  # bytes of a header, of which every member fills a multiple
NOTHING = (0, -1)  # place of a member that is not there


@dataclass(frozen=True)
class TarIndex:
    """All samples, in the order of the shards and of the pictures in them.

    shard [N]: number of the sample's file in `shards`. picture, text [N, 2] int64: offset and length of the members in
    bytes, length -1 without one. is_json [N] bool: of the text. names: UTF-8, "shard.tar/000123" a line.
    kept [K]: the samples that were found sound when captions were read as `checked` says; all before that.
    cut: shards that end within a member. content: digest of texts, and of names, lengths and times of pictures.
    """

    shards: Sequence[Path]
    shard: Tensor
    picture: Tensor
    text: Tensor
    is_json: Tensor
    names: bytes
    cut: Sequence[str]
    content: str
    kept: Tensor
    checked: str | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def all(self) -> TarIndex:
        """The index with every sample, sound or not."""
        return replace(self, kept=torch.arange(len(self.shard)), checked=None)

    def only(self, kept: Sequence[int], checked: str) -> TarIndex:
        """The index of these samples alone, numbered among those it has now."""
        return replace(self, kept=self.kept[torch.tensor(kept, dtype=torch.int64)], checked=checked)

    def read(self, i: int, member: str) -> bytes:
        """The bytes of the i-th kept sample's "picture" or "text"."""
        row = int(self.kept[i])
        offset, length = getattr(self, member)[row].tolist()
        with self.shards[int(self.shard[row])].open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def has_text(self, i: int) -> bool:
        """Whether the i-th kept sample has a text member."""
        return bool(self.text[self.kept[i], 1] >= 0)

    def name(self, i: int) -> str:
        """What the i-th kept sample is called."""
        return self.names.decode().split("\n")[int(self.kept[i])]


def open_index(shards: Sequence[Path], file: Path) -> TarIndex:
    """The index of these shards, read from `file` when it is theirs, else made and written there.

    UserError when a shard is no plain tar file; RunFailed when the file cannot be written.
    """
    found = _read(shards, file)
    if found is None:
        found = make_index(shards)
        write_index(found, file)
    return found


def make_index(shards: Sequence[Path]) -> TarIndex:
    """Goes through all headers and texts. UserError when a shard is no plain tar file."""
    rows: list[_Sample] = []
    numbers, cut = [], []
    for number, shard in enumerate(shards):
        samples, whole = _samples(shard)
        rows += samples
        numbers += [number] * len(samples)
        cut += [] if whole else [shard.name]
    return TarIndex(
        shards=shards,
        shard=torch.tensor(numbers, dtype=torch.int32),
        picture=torch.tensor([row.picture for row in rows], dtype=torch.int64).reshape(-1, 2),
        text=torch.tensor([row.text for row in rows], dtype=torch.int64).reshape(-1, 2),
        is_json=torch.tensor([row.is_json for row in rows], dtype=torch.bool),
        names="\n".join(row.name for row in rows).encode(),
        cut=cut,
        content=digest(*(row.content for row in rows)),
        kept=torch.arange(len(rows)),
    )


def write_index(index: TarIndex, file: Path) -> None:
    """Replaces `file` by this index, in one rename."""
    names = torch.frombuffer(bytearray(index.names or b"\n"), dtype=torch.uint8)
    tensors = {name: getattr(index, name) for name in ("shard", "picture", "text", "is_json", "kept")}
    said = {
        "format": FORMAT,
        "shards": json.dumps(_state(index.shards)),
        "cut": json.dumps(list(index.cut)),
        "content": index.content,
        "checked": json.dumps(index.checked),
    }
    aside = file.with_name(f".{file.name}.{os.getpid()}")  # other processes may be writing the same index
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(save({**tensors, "names": names}, said))
        aside.replace(file)
    except OSError as error:
        raise RunFailed(f"webdataset: cannot write '{file}': {error.strerror}; set `index: FILE` elsewhere") from None


def _read(shards: Sequence[Path], file: Path) -> TarIndex | None:
    """The index in `file`; None when there is none, or another's."""
    try:
        with safe_open(file, "pt") as opened:
            said = opened.metadata() or {}
            if said.get("format") != FORMAT or json.loads(said["shards"]) != _state(shards):
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    names = tensors.pop("names").numpy().tobytes()
    cut, checked = json.loads(said["cut"]), json.loads(said["checked"])
    return TarIndex(shards, **tensors, names=names, cut=cut, content=said["content"], checked=checked)


def _state(shards: Sequence[Path]) -> list[list[str | int]]:
    return [[shard.name, shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards]


# ---- one shard


@dataclass
class _Sample:
    name: str
    picture: tuple[int, int] = NOTHING
    text: tuple[int, int] = NOTHING
    is_json: bool = False
    content: str = ""


def _samples(shard: Path) -> tuple[list[_Sample], bool]:
    """The samples with a picture, and whether the shard is whole."""
    found: dict[str, _Sample] = {}
    size, end = shard.stat().st_size, 0
    try:
        with shard.open("rb") as raw, tarfile.open(shard, "r:") as tar:
            for member in _members(tar):
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if end <= size:
                    _add(found, shard, member, raw.fileno())
            whole = not os.pread(raw.fileno(), BLOCK, end).strip(b"\0")  # what is no zeros there is no header either
    except tarfile.ReadError as error:
        if not end:
            raise UserError(
                f"webdataset: '{shard}' is no plain tar file ({error}): unpack .tar.gz shards, whose members have no place"
            ) from None
        whole = False
    return [sample for sample in found.values() if sample.picture != NOTHING], whole


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would remember all of them
        yield member


def _add(found: dict[str, _Sample], shard: Path, member: tarfile.TarInfo, raw: int) -> None:
    """Notes a member in its sample, if it is a picture or a text."""
    folder, _, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    suffix = (dot + suffix).lower()
    if not member.isreg() or not stem or suffix not in (*SUFFIXES, *TEXTS):
        return
    name = "/".join(part for part in (shard.name, folder.removeprefix(".").strip("/"), stem) if part)
    sample = found.setdefault(name, _Sample(name))
    place = (member.offset_data, member.size)
    if suffix in SUFFIXES and sample.picture == NOTHING:
        sample.picture = place
        sample.content = digest(sample.content, f"{member.name} {member.size} {member.mtime}")
    elif suffix in TEXTS and (sample.text == NOTHING or (sample.is_json and suffix == ".txt")):
        sample.text, sample.is_json = place, suffix == ".json"
        sample.content = digest(sample.content, os.pread(raw, member.size, member.offset_data))
