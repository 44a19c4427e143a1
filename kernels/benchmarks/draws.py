"""Milliseconds of a draw at the sizes of small runs, beside torch.randn: `python kernels/benchmarks/draws.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch

from fewstep.draws import Draw

ROWS = 128
CASES: dict[str, tuple[Callable[[Draw], object], tuple[int, ...]]] = {
    "normal 1x8x8": (lambda draw: draw.normal("x", 1, 8, 8), (ROWS, 1, 8, 8)),
    "normal 1x28x28": (lambda draw: draw.normal("x", 1, 28, 28), (ROWS, 1, 28, 28)),
    "normal 3x32x32": (lambda draw: draw.normal("x", 3, 32, 32), (ROWS, 3, 32, 32)),
    "uniform": (lambda draw: draw.uniform("x"), (ROWS,)),
    "uniform low..high": (lambda draw: draw.uniform("x", low=0.02, high=0.98), (ROWS,)),
    "integers": (lambda draw: draw.integers("x", 10), (ROWS,)),
    "integers per step": (lambda draw: draw.integers("x", 10, per="step"), (1,)),
    "choice": (lambda draw: draw.choice("x", 0.1), (ROWS,)),
}


def milliseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """Median wall time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def fresh(call: Callable[[Draw], object]) -> object:
    """`call` on a Draw of its own; making that is part of the cost."""
    return call(Draw(0, 1, np.arange(ROWS)))


def main() -> None:
    """Prints a line a case, for 128 rows on one thread."""
    torch.set_num_threads(1)
    print(f"{'':20}{'draw ms':>10}{'torch.randn ms':>16}")
    for name, (call, shape) in CASES.items():
        ours, plain = milliseconds(partial(fresh, call)), milliseconds(partial(torch.randn, shape))
        print(f"{name:20}{ours:10.3f}{plain:16.3f}")


if __name__ == "__main__":
    main()
