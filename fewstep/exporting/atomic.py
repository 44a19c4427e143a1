"""Folders that are whole or absent: written aside, flushed to disk, renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import RunFailed


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """An empty folder that becomes `out` in one rename when the block ends well, in place of what was there.

    When the block raises, the folder vanishes and `out` stays as it was. RunFailed when the disk refuses.
    """
    aside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".writing-{out.name}-", dir=out.parent))
        aside.chmod(0o755)  # mkdtemp's folders are closed to others
        yield aside
        _flush(aside)
        _swap(aside, out)
        _sync(out.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the operating system's error
        raise RunFailed(f"cannot write '{out}': {getattr(error, 'strerror', None) or error}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _swap(aside: Path, out: Path) -> None:
    """Renames `aside` to `out`; a folder in the way is moved off first and removed last."""
    if not out.exists():
        os.replace(aside, out)
        return
    old = out.with_name(f"{aside.name}-old")
    os.replace(out, old)
    try:
        os.replace(aside, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for place in [*folder.rglob("*"), folder]:
        if place.is_file():
            place.chmod(0o644)  # safetensors' files are closed to others
        _sync(place)


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
