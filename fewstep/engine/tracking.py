"""Where numbers go: metrics.jsonl always, and the trackers a recipe asks for, through accelerate."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import UserError
from . import distributed
from .levels import BINS, means


@dataclass
class Window:
    """Sums of logged tensors since the last log line, so that logging costs one host sync."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    levels: dict[str, Tensor] = field(default_factory=dict)

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Counts each number in; alternating turns report different names."""
        for name, number in numbers.items():
            self.sums[name] = self.sums[name] + number if name in self.sums else number
            self.counts[name] = self.counts.get(name, 0) + 1

    def add_levels(self, tables: Mapping[str, Tensor]) -> None:
        """Adds name -> [2, bins] up, the sums and counts of rows by noise level."""
        for name, table in tables.items():
            self.levels[name] = self.levels[name] + table if name in self.levels else table

    def take(self) -> dict[str, float]:
        """Means over the window and over processes, then those of noise levels with rows; empties the window."""
        if not self.sums:
            return {}
        numbers = torch.stack([self.sums[n].float() / (self.counts[n] * distributed.world()) for n in self.sums])
        tables = [table.flatten() for table in self.levels.values()]
        said = distributed.sum_tensors({"all": torch.cat([numbers, *tables])})["all"].tolist()
        values = dict(zip(self.sums, said))
        for i, name in enumerate(self.levels):
            start = len(numbers) + 2 * BINS * i
            values |= means(name, said[start : start + BINS], said[start + BINS : start + 2 * BINS])
        self.sums, self.counts, self.levels = {}, {}, {}
        return values


class Tracker:
    """One line of JSON a logged step: `{"stage", "step", "time", "loss.dm": ..., ...}`."""

    def __init__(self, accelerator: Accelerator, file: Path, trackers: list[str], config: Mapping[str, Any]):
        self.accelerator, self.file, self.start = accelerator, file, time.monotonic()
        self.others = bool(trackers)
        if trackers:
            accelerator.init_trackers("fewstep", config={k: str(v) for k, v in config.items()})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line; numbers also go to the trackers. Does nothing on other processes than the first."""
        if not self.accelerator.is_main_process:
            return
        line = {"step": step, "time": round(time.monotonic() - self.start, 3), **values}
        with self.file.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
        if self.others:
            self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def close(self) -> None:
        """Ends the trackers' runs."""
        if self.others:
            self.accelerator.end_training()


def require_trackers(names: list[str]) -> None:
    """UserError when a tracker's package is not installed."""
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise UserError(f"train.trackers: '{name}' is not installed: pip install {name}")


def read_metrics(file: Path, upto: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to and including step `upto`; a line cut off by a crash is left out."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if upto is None or line["step"] <= upto:
            lines.append(line)
    return lines


def rewind(file: Path, step: int) -> None:
    """Drops lines after `step`, so that a resumed run does not log a step twice."""
    kept = read_metrics(file, step)
    if file.is_file():
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
