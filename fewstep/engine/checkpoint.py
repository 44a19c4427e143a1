"""Checkpoints that are whole or absent: written aside, flushed to disk, renamed. safetensors and JSON only.

checkpoints/step-40/student.role.safetensors  student.ema...  student.optimizer...  method...  feed.train...
checkpoints/step-40/state.json                place in the run, and the sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import RunFailed, UserError
from ..exporting.atomic import sha256, written_aside
from ..models.folder import refuse_pickles

STATE = "state.json"
Files = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back: `files[name]` holds tensors by name, `state` is the JSON part."""

    folder: Path
    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(root: Path, step: int, files: Files, state: Mapping[str, Any]) -> Path:
    """Writes `root/step-N` atomically. RunFailed when the disk is full; what was there before stays whole."""
    target = root / f"step-{step}"
    try:
        with written_aside(target) as aside:
            hashes = {f"{name}.safetensors": _write(aside / f"{name}.safetensors", t) for name, t in files.items()}
            (aside / STATE).write_text(json.dumps({**state, "sha256": hashes}, indent=1))
    except RunFailed as error:
        raise RunFailed(f"{error}. {last_good(root)}") from error
    return target


def _write(file: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, file)
    return sha256(file)


def steps(root: Path) -> list[int]:
    """Steps with a whole checkpoint, ascending. Folders that were being written are not among them."""
    found = (p for p in root.glob("step-*") if (p / STATE).is_file()) if root.is_dir() else ()
    return sorted(int(p.name.removeprefix("step-")) for p in found)


def last_good(root: Path) -> str:
    """A sentence for error messages."""
    done = steps(root)
    return f"The last good checkpoint is {root / f'step-{done[-1]}'}" if done else "There is no checkpoint yet"


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint; UserError when it holds a pickle, a file is missing, or a byte differs."""
    if not (folder / STATE).is_file():
        raise UserError(f"'{folder}' is no checkpoint: it has no {STATE}")
    refuse_pickles(folder)
    state = json.loads((folder / STATE).read_text())
    files = {}
    for name, expected in state["sha256"].items():
        file = folder / name
        if not file.is_file() or sha256(file) != expected:
            what = "is missing" if not file.is_file() else "differs from its sha256"
            raise UserError(
                f"checkpoint '{folder}' is damaged: {name} {what}. Remove the folder to go on from an earlier one"
            )
        files[name.removesuffix(".safetensors")] = load_file(file)
    return Checkpoint(folder, files, state)


def newest(root: Path) -> Checkpoint | None:
    """The checkpoint with the largest step, or None."""
    done = steps(root)
    return load(root / f"step-{done[-1]}") if done else None


def prune(root: Path, keep_last: int, best: int | None) -> None:
    """Removes all but the last `keep_last` checkpoints and the best one, and leftovers of interrupted writing."""
    for step in steps(root)[:-keep_last]:
        if step != best:
            shutil.rmtree(root / f"step-{step}")
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes, for comparing two runs."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
