"""Time and peak memory of attention by back end: forward, with a tangent, with gradients, and with gradients of both.

    python kernels/benchmarks/attention.py --device cuda [--csv FILE]      # bfloat16, N 1024 and 4096, D 64, 72 and 128
    python kernels/benchmarks/attention.py [--csv FILE]                    # CPU: float32, N 256 and 1024, D 64

Back ends take turns, A B A B, in one process: medians of milliseconds with the quantiles at 20 and 80 %. Memory is measured in runs
of its own, beyond the inputs. Inputs are unit normals: zeros run faster.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fewstep_kernels.attention import attention
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

BACKENDS = ("triton", "chunked", "reference", "sdpa", "sdpa_math", "xformers")
CASES: dict[str, dict[str, Any]] = {
    "cuda": {
        "dtype": torch.bfloat16,
        "shapes": [(16, n, d) for n in (1024, 4096) for d in (64, 72, 128)],
        "samples": 20,
    },
    "cpu": {"dtype": torch.float32, "shapes": [(4, n, 64) for n in (256, 1024)], "samples": 5},
}


def forward(f: Callable[..., Tensor], some: list[Tensor]) -> None:
    """o, no graph."""
    with torch.no_grad():
        f(*some[:3])


def tangent(f: Callable[..., Tensor], some: list[Tensor]) -> None:
    """o and to, no graph: what `maths.derivative` asks."""
    with torch.no_grad():
        torch.func.jvp(f, tuple(some[:3]), tuple(some[3:]))


def gradient(f: Callable[..., Tensor], some: list[Tensor]) -> None:
    """o and its three gradients."""
    leaves = [x.detach().requires_grad_() for x in some[:3]]
    torch.autograd.grad(f(*leaves).float().sum(), leaves)


def both(f: Callable[..., Tensor], some: list[Tensor]) -> None:
    """o, to, and the six gradients of a functional of both."""
    leaves = [x.detach().requires_grad_() for x in some]
    o, to = torch.func.jvp(f, tuple(leaves[:3]), tuple(leaves[3:]))
    torch.autograd.grad(o.float().sum() + to.float().sum(), leaves)


MODES = {"forward": forward, "tangent": tangent, "gradient": gradient, "both": both}


def milliseconds(run: Callable[[], None], device: str) -> float:
    """Wall time of one call, to the end of what it started."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1e3 * (time.perf_counter() - start)


def megabytes(run: Callable[[], None], device: str) -> float:
    """Peak beyond what was held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    live = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most / 2**20


def compared(runs: dict[str, Callable[[], None]], device: str, samples: int) -> Iterator[dict[str, Any]]:
    """A row for each back end that serves; each is called once, to compile, before the clock runs."""
    served, times = {}, {}
    for name, run in runs.items():
        try:
            run()
        except (ValueError, RuntimeError) as reason:
            yield {"backend": name, "note": str(reason).splitlines()[0].split(": write one of")[0]}
            continue
        served[name], times[name] = run, []
    for _ in range(samples):
        for name, run in served.items():
            times[name].append(milliseconds(run, device))
    for name, run in served.items():
        low, middle, high = torch.tensor(times[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        found = {"ms": middle, "ms 20 %": low, "ms 80 %": high, "MiB": megabytes(run, device)}
        yield {"backend": name, **{key: f"{value:.3f}" for key, value in found.items()}}


def table(device: str, heads: int = 8) -> Iterator[dict[str, Any]]:
    """All cases of `device`."""
    case = CASES[device]
    for batch, n, d in case["shapes"]:
        some = [torch.randn(batch, heads, n, d, device=device, dtype=case["dtype"]) for _ in range(6)]
        for mode, run in MODES.items():
            runs = {name: partial(run, partial(attention, backend=name), some) for name in BACKENDS}
            for row in compared(runs, device, case["samples"]):
                yield {"mode": mode, "B": batch, "H": heads, "N": n, "D": d, "dtype": str(case["dtype"])[6:], **row}


def machine(device: str) -> str:
    """Card or processor, and versions."""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    )
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    """Prints the table, or writes it as CSV."""
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("--device", default="cpu", choices=CASES)
    said.add_argument("--csv", help="a file to write")
    args = said.parse_args()
    names = ("machine", "mode", "B", "H", "N", "D", "dtype", "backend", "ms", "ms 20 %", "ms 80 %", "MiB", "note")
    with open(args.csv, "w", newline="") if args.csv else sys.stdout as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in table(args.device):
            writer.writerow({"machine": machine(args.device), **row})
            file.flush()


if __name__ == "__main__":
    main()
