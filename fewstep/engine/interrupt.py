"""SIGTERM and Ctrl-C finish the step and save; a second one ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import distributed

WATCHED = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Interrupt:
    """`name` is the signal that came, or None."""

    name: str | None = None

    def stops(self, device: torch.device, due: bool) -> bool:
        """Whether the run ends after this step. Several processes agree on it, and only in a step that is `due`."""
        if distributed.world() == 1:
            return self.name is not None
        return due and distributed.any_process(self.name is not None, device)

    def _note(self, number: int, _frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def watching() -> Iterator[Interrupt]:
    """Within the block signals are noted and nothing is cut off; before and after, they act as they did."""
    interrupt = Interrupt()
    try:
        before = {number: signal.signal(number, interrupt._note) for number in WATCHED}
    except ValueError:  # not the main thread (a notebook's worker), where no handler can be set
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
