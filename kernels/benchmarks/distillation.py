"""Time and peak memory of a distillation loss, forward and backward, against plain logits and public implementations.

    python kernels/benchmarks/distillation.py [--device cuda] [--tokens 512 --words 32000 --widths 512 1024] [--csv FILE]

Candidates take turns in one process; a ratio is the median over rounds of theirs / ours (`chunked`) in the same round. On
CPU the time is that of the process, which other programs do not enter. Peaks are measured in a process each, above inputs.
Liger-Kernel and TRL take part where they are installed.
"""

from __future__ import annotations

import argparse
import csv
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from fewstep_kernels.distillation import Head, distillation_loss
from torch import Tensor

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
OURS = "chunked"
Case = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden [n, D], weight [V, D] and the teacher's
Loss = Callable[[Case, float], Tensor]


def ours(backend: str, case: Case, beta: float) -> Tensor:
    """This package."""
    return distillation_loss(
        Head(*case[:2]), Head(*case[2:]), divergence="jsd", beta=beta, scaled=False, backend=backend
    )


def liger(chunk: int, case: Case, beta: float) -> Tensor:
    """Liger-Kernel's torch implementation, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False, chunk_size=chunk)
    return loss(*case, torch.zeros(len(case[0]), dtype=torch.long, device=case[0].device))


def trl(case: Case, beta: float) -> Tensor:
    """TRL's function, by tiles of 4096 tokens and 32768 words."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, theirs, teacher_weight = case
    return ChunkedDivergenceFunction.apply(hidden, weight, None, theirs, teacher_weight, None, beta)[0].mean()


CANDIDATES: dict[str, Loss] = {
    OURS: partial(ours, OURS),
    "triton": partial(ours, "triton"),
    "plain logits": partial(ours, "reference"),
    "liger 128": partial(liger, 128),
    "liger 1024": partial(liger, 1024),
    "trl": trl,
}


def inputs(said: argparse.Namespace) -> Case:
    """Heads whose logits are of a language model's size."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if said.device == "cuda" else torch.float32
    new = partial(torch.randn, device=said.device, dtype=dtype)
    width, theirs = said.widths
    weights = (new(said.words, w).mul_(2 * w**-0.5) for w in (width, theirs))
    weight, teacher_weight = (w.requires_grad_(i == 0) for i, w in enumerate(weights))
    return new(said.tokens, width).requires_grad_(), weight, new(said.tokens, theirs), teacher_weight


def step(loss: Loss, case: Case, beta: float) -> tuple[Tensor, ...]:
    """The loss and its gradients in the student's hidden states and weights."""
    value = loss(case, beta)
    return value, *torch.autograd.grad(value, case[:2])


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    gc.collect()
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak(said: argparse.Namespace) -> float:
    """Megabytes that one step needs above its inputs."""
    case = inputs(said)
    small = argparse.Namespace(**vars(said) | {"tokens": 2, "words": 8})
    call = partial(step, CANDIDATES[said.peak], beta=BETA[said.kind])
    call(case=inputs(small))  # imports, threads and libraries
    if said.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(case=case)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    call(case=case)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """Megabytes from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def usable(case: Case) -> list[str]:
    """Candidates that run here and agree with plain logits."""
    right = step(CANDIDATES["plain logits"], case, 0.5)
    tolerance = 0.02 if case[0].dtype == torch.bfloat16 else 1e-4
    names = []
    for name, loss in CANDIDATES.items():
        try:
            found = step(loss, case, 0.5)
        except (ImportError, ValueError) as reason:
            print(f"{name}: left out ({reason})")
            continue
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True))
        assert error < tolerance, f"{name} differs from plain logits by {error:.1e}"
        names.append(name)
    return names


def rows(said: argparse.Namespace, kind: str, names: list[str], case: Case) -> list[dict[str, object]]:
    """A row a candidate: seconds, megabytes, and both as multiples of ours."""
    times = [
        {name: seconds(partial(step, CANDIDATES[name], case, BETA[kind]), said.device) for name in names}
        for _ in range(said.repeats + 1)
    ][1:]
    again = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, "--peak"]
    peaks = {name: float(subprocess.check_output([*again, name], text=True)) for name in names}
    shape = f"{said.tokens}x{said.widths[0]}/{said.widths[1]}x{said.words}"
    return [
        {
            "op": f"distillation {kind}",
            "shape": shape,
            "dtype": str(case[0].dtype).removeprefix("torch."),
            "device": said.device,
            "provider": name,
            "seconds": round(median(t[name] for t in times), 4),
            "times_ours": round(median(t[name] / t[OURS] for t in times), 2),
            "peak_mb": round(peaks[name]),
            "peak_ours": round(peaks[name] / peaks[OURS], 2),
        }
        for name in names
    ]


def main() -> None:
    """Prints a line a candidate, and writes them to --csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--words", type=int, default=32_000)
    parser.add_argument("--widths", type=int, nargs=2, default=(512, 1024), help="student's and teacher's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--kind", choices=list(BETA), help="one divergence only")
    parser.add_argument("--peak", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    said = parser.parse_args()
    torch.set_num_threads(1)
    if said.peak:
        print(peak(said))
        return
    case = inputs(said)
    names = usable(case)
    table = [row for kind in ([said.kind] if said.kind else BETA) for row in rows(said, kind, names, case)]
    for row in table:
        print("  ".join(f"{value!s:>14}" for value in row.values()), flush=True)
    if said.csv:
        with said.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
