"""Offline artefacts: rows of tensors under sample ids (soft labels, embeddings, annotations), kept by content.

On disk a store is a folder of safetensors shards and an `index.json`; nothing is pickled. A shard is named by its own
sha256 and the index is replaced in one rename, so a commit that is cut off leaves the version before it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from .errors import RunFailed, UserError

FORMAT = 1
SHARD_BYTES = 256 * 2**20
INDEX = "index.json"
ASIDE = ".aside"
IDS = "ids"  # the column of a shard that holds its rows' ids


class Store:
    """Rows under int64 ids, in memory, committed to `folder/name` as a whole.

        store = Store.open(folder, "soft_labels")
        if store.key != key:                              # made from other inputs, or never
            store.clear()
            store.write(batch.ids, probabilities=p)       # once for each batch
            store.commit(key, {"teacher": "vit"})
        store.read(batch.ids)["probabilities"]            # [rows, classes]

    All rows have the same columns, fixed by the first write.
    """

    _columns: dict[str, Tensor]  # [capacity, ...]: only the first len(self) rows are in use
    _position: dict[int, int]
    _key: str | None
    _meta: dict[str, Any]

    def __init__(self, folder: Path, name: str):
        self.name, self.path = name, Path(folder) / name
        self.clear()

    @classmethod
    def open(cls, folder: Path, name: str) -> Store:
        """What was committed under `folder/name`; an empty store (key None) when nothing was. UserError if damaged."""
        store = cls(folder, name)
        if not (store.path / INDEX).exists():
            return store
        index = _read_index(store.path)
        for sha256 in index["shards"]:
            rows = load(_read(_shard(store.path, sha256), sha256))
            store.write(rows[IDS], **{name: rows[name] for name in index["columns"]})
        store._key, store._meta = index["key"], index["meta"]
        return store

    @property
    def key(self) -> str | None:
        """The key under which exactly these rows were committed; None once rows were written or cleared since."""
        return self._key

    @property
    def meta(self) -> dict[str, Any]:
        """What was said about the rows at the last commit."""
        return self._meta

    def __len__(self) -> int:
        return len(self._position)

    def __contains__(self, sample: int) -> bool:
        return int(sample) in self._position

    def ids(self) -> Tensor:
        """All ids [n] int64, in the order in which they were first written."""
        return torch.tensor(list(self._position), dtype=torch.int64)

    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)

    def write(self, ids: Tensor, **columns: Tensor) -> None:
        """Keeps row i of every column [n, ...] under ids[i], in place of an earlier one; of equal ids the last wins.

        Raises ValueError when the columns differ from those of the store in name, dtype or shape of a row.
        """
        last = {sample: i for i, sample in enumerate(ids.tolist())}
        rows = {name: column.detach().cpu() for name, column in columns.items()}
        self._check(len(ids), rows)
        positions = [self._position.setdefault(sample, len(self._position)) for sample in last]
        for name, column in rows.items():
            kept = column if len(last) == len(ids) else column[list(last.values())]
            self._room(name, column)[positions] = kept
        self._key = None

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """The rows of `ids` in their order, column -> [n, ...]. UserError names the first id that is missing."""
        try:
            positions = torch.tensor([self._position[sample] for sample in ids.tolist()], dtype=torch.int64)
        except KeyError as missing:
            raise UserError(
                f"store '{self.name}' holds {len(self)} samples and not number {missing}: run the stage that writes it"
            ) from None
        return {name: column.index_select(0, positions) for name, column in self._columns.items()}

    def clear(self) -> None:
        """Forgets all rows and columns. What is on disk stays until the next commit."""
        self._columns, self._position, self._key, self._meta = {}, {}, None, {}

    def commit(self, key: str, meta: dict[str, Any]) -> None:
        """Replaces what is on disk by these rows; `key` is the `content_key` of what they were made from.

        RunFailed when the disk refuses; then the version before is still there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            shards = [_write_shard(self.path, rows) for rows in self._shards()]
            columns = self.columns()  # in their order, which a shard does not keep
            index = {"format": FORMAT, "key": key, "meta": meta, "columns": columns, "shards": shards}
            _write_index(self.path, index)
        except OSError as error:
            raise RunFailed(f"store '{self.name}' was not saved, its last version is whole: {error}") from error
        finally:
            _sweep(self.path)
        self._key, self._meta = key, meta

    def _check(self, n: int, rows: dict[str, Tensor]) -> None:
        if not rows or IDS in rows:
            raise ValueError(f"store '{self.name}' takes one or more columns, none called '{IDS}'")
        if any(len(column) != n for column in rows.values()):
            raise ValueError(f"store '{self.name}': {n} ids need {n} rows in every column")
        given = {name: (column.dtype, column.shape[1:]) for name, column in rows.items()}
        held = {name: (column.dtype, column.shape[1:]) for name, column in self._columns.items()}
        if held and given != held:
            raise ValueError(f"store '{self.name}' holds columns {held}, not {given}")

    def _room(self, name: str, like: Tensor) -> Tensor:
        """The column, at least as long as there are positions; it doubles when it grows."""
        column = self._columns.get(name, like.new_empty((0, *like.shape[1:])))
        if len(column) < len(self):
            grown = like.new_empty((max(len(self), 2 * len(column)), *like.shape[1:]))
            grown[: len(column)] = column
            column = grown
        self._columns[name] = column
        return column

    def _shards(self) -> Iterator[dict[str, Tensor]]:
        ids = self.ids()
        row_bytes = ids.itemsize + sum(column[:1].nbytes for column in self._columns.values())
        length = max(1, SHARD_BYTES // row_bytes)
        for start in range(0, len(self), length):
            rows = slice(start, min(start + length, len(self)))
            yield {IDS: ids[rows], **{name: column[rows] for name, column in self._columns.items()}}


def content_key(*parts: Any) -> str:
    """sha256 that is equal for equal contents: nested lists and dicts of plain values, tensors, arrays, files, folders.

    A `pathlib.Path` stands for what is in the file or folder, a string for itself. TypeError on anything else.
    """
    digest = hashlib.sha256()
    for piece in _pieces(parts):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


@singledispatch
def _pieces(part: Any) -> Iterator[bytes | memoryview]:
    """`part` as byte strings; each kind opens with its own tag, so that no two contents read alike."""
    raise TypeError(f"content_key cannot hash a {type(part).__name__}")


@_pieces.register(type(None))
@_pieces.register(str)
@_pieces.register(int)
@_pieces.register(float)
def _(part: str | float | None) -> Iterator[bytes | memoryview]:
    yield b"json"
    yield json.dumps(part).encode()


@_pieces.register(list)
@_pieces.register(tuple)
def _(part: list[Any] | tuple[Any, ...]) -> Iterator[bytes | memoryview]:
    yield b"list %d" % len(part)
    for item in part:
        yield from _pieces(item)


@_pieces.register
def _(part: dict) -> Iterator[bytes | memoryview]:
    yield b"dict %d" % len(part)
    for name in sorted(part):
        yield from _pieces(name)
        yield from _pieces(part[name])


@_pieces.register
def _(part: Tensor) -> Iterator[bytes | memoryview]:
    yield f"tensor {part.dtype} {tuple(part.shape)}".encode()
    yield part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@_pieces.register(np.ndarray)
@_pieces.register(np.generic)
def _(part: np.ndarray | np.generic) -> Iterator[bytes | memoryview]:
    if part.dtype.hasobject:
        raise TypeError("content_key cannot hash an array of objects")
    yield f"array {part.dtype.str} {part.shape}".encode()
    yield np.ascontiguousarray(part).tobytes()


@_pieces.register
def _(part: Path) -> Iterator[bytes | memoryview]:
    if part.is_dir():
        files = sorted(file for file in part.rglob("*") if file.is_file())
        yield from _pieces({file.relative_to(part).as_posix(): file for file in files})
    else:
        yield b"file"
        yield _sha256_of(part).encode()


def _sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _shard(folder: Path, sha256: str) -> Path:
    return folder / f"rows-{sha256[:32]}.safetensors"


def _write_shard(folder: Path, rows: dict[str, Tensor]) -> str:
    data = save(rows)
    sha256 = hashlib.sha256(data).hexdigest()
    _write(_shard(folder, sha256), data)
    return sha256


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    """The index is written with its own checksum: it names the shards and the key, which nothing else vouches for."""
    index = json.loads(json.dumps(index))  # as it will be read: tuples are lists, keys are strings
    sealed = {"index": index, "sha256": content_key(index)}
    _write(folder / INDEX, json.dumps(sealed, indent=1).encode())


def _write(file: Path, data: bytes) -> None:
    """Writes aside, flushes to the disk, renames: `file` holds either what it held or all of `data`."""
    aside = file.with_name(file.name + ASIDE)
    with aside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the rename itself may be lost with the power
    finally:
        os.close(folder)


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        sealed = json.loads(_read(file))
        index, whole = sealed["index"], content_key(sealed["index"]) == sealed["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise _damaged(file)
    if index["format"] != FORMAT:
        raise UserError(f"{file} has format {index['format']} and this version reads {FORMAT}: install a newer fewstep")
    return index


def _read(file: Path, sha256: str | None = None) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): delete its folder and run the stage again") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(file)
    return data


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged: delete its folder and run the stage that writes it again")


def _sweep(folder: Path) -> None:
    """Removes shards that the index on disk does not name, and files left aside."""
    try:
        shards = _read_index(folder)["shards"] if (folder / INDEX).exists() else []
    except UserError:
        return  # a damaged index: nothing is known to be spare
    named = {_shard(folder, sha256) for sha256 in shards}
    for file in {*folder.glob("rows-*.safetensors"), *folder.glob(f"*{ASIDE}")} - named:
        file.unlink(missing_ok=True)
