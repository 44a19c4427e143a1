"""Errors of the kernels and of `chunked` against float64, by dtype and head dim, as a table.

    TRITON_INTERPRET=1 python kernels/benchmarks/attention_errors.py [--csv FILE]       # without a GPU
    python kernels/benchmarks/attention_errors.py --device cuda [--csv FILE]

Of each back end: the largest absolute errors of output and tangent over plain, causal and padded calls, and the largest relative
Frobenius errors of both and of the six gradients. The last lines are the experiment on the centre of the tangent:
tk = randn + size * one vector that all keys share, which leaves the tangent as it is but for rounding.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from typing import Any

import torch
from fewstep_kernels.attention import attention, backends
from torch import Tensor

DIMS = (32, 64, 72, 80, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, KEYS = 33, 70
CALLS: tuple[tuple[int, dict[str, Any]], ...] = (
    (KEYS, {}), (ROWS, {"causal": True}), (KEYS, {"mask": torch.tensor([41])}),
)  # fmt: skip


def drawn(keys: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and their tangents, of unit normals."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, n, dim, generator=generator).to(device, dtype) for n in (ROWS, keys, keys) * 2]


def answers(backend: str, some: list[Tensor], said: dict[str, Any]) -> list[Tensor]:
    """Output, tangent and the gradients of the sums of their squares in the six inputs."""
    leaves = [x.detach().requires_grad_() for x in some]
    o, to = torch.func.jvp(lambda *x: attention(*x, backend=backend, **said), tuple(leaves[:3]), tuple(leaves[3:]))
    loss = o.double().square().sum() + to.double().square().sum()
    return [x.detach().double() for x in (o, to, *torch.autograd.grad(loss, leaves))]


def errors(backend: str, dim: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest of each kind over `CALLS`."""
    worst = dict.fromkeys(("abs o", "abs to", "rel o", "rel to", "rel gradients"), 0.0)
    for keys, said in CALLS:
        some = drawn(keys, dim, dtype, device)
        said = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in said.items()}
        found, right = answers(backend, some, said), answers("sdpa_math", [x.double() for x in some], said)
        gaps = [a - b for a, b in zip(found, right)]
        rel = [(g.norm() / b.norm()).item() for g, b in zip(gaps, right)]
        new = (gaps[0].abs().max().item(), gaps[1].abs().max().item(), rel[0], rel[1], max(rel[2:]))
        worst = {name: max(old, x) for (name, old), x in zip(worst.items(), new)}
    return worst


def centre(size: float, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors of the tangent with and without a centre; N 64, M 128, D 64, one head."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, tq, tk, tv = (torch.randn(1, 1, n, 64, generator=generator) for n in (64, 128, 128) * 2)
    tk = tk + size * torch.randn(64, generator=generator)
    some = [x.to(device, dtype) for x in (q, k, v, tq, tk, tv)]
    wide = [x.double() for x in some]

    def tangent(backend: str, x: list[Tensor]) -> Tensor:
        return torch.func.jvp(lambda *y: attention(*y, backend=backend), tuple(x[:3]), tuple(x[3:]))[1].double()

    right = tangent("sdpa_math", wide)
    rows = {"no centre": uncentred(*some).double(), **{name: tangent(name, some) for name in served(device)}}
    return {name: ((x - right).norm() / right.norm()).item() for name, x in rows.items()}


def uncentred(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor) -> Tensor:
    """p ds is rounded to the inputs' type as it is, and its mean times o subtracted at the end."""
    dtype, (q, k, v, tq, tk, tv) = q.dtype, (x.float() for x in (q, k, v, tq, tk, tv))
    p = torch.softmax(q @ k.mT / 8, -1)
    moved = p * (tq @ k.mT + q @ tk.mT) / 8
    return moved.to(dtype).float() @ v + p.to(dtype).float() @ tv - moved.sum(-1, keepdim=True) * (p @ v)


def served(device: str) -> list[str]:
    """Triton where it is to be had, and chunked."""
    some = drawn(KEYS, 32, torch.float32, device)
    call = backends.Call(tuple(some[:3]), tuple(some[:3]), (None,) * 3, None, backends.Form(1.0))  # type: ignore[arg-type]
    return ["triton", "chunked"] if backends.BACKENDS["triton"].refuses(call) is None else ["chunked"]


def table(device: str) -> Iterator[dict[str, Any]]:
    """A row for each back end, dtype and head dim, then the rows of the centre."""
    for backend in served(device):
        for dtype in DTYPES:
            for dim in DIMS:
                yield {"backend": backend, "dtype": str(dtype)[6:], "dim": dim, **errors(backend, dim, dtype, device)}
    for dtype in (torch.bfloat16, torch.float32):
        for size in (0, 1, 10, 100):
            for name, error in centre(size, dtype, device).items():
                yield {"backend": name, "dtype": str(dtype)[6:], "dim": f"64, common {size}", "rel to": error}


def main() -> None:
    """Prints the table, or writes it as CSV."""
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("--device", default="cpu")
    said.add_argument("--csv", help="a file to write")
    args = said.parse_args()
    torch.set_num_threads(1)
    names = ("backend", "dtype", "dim", "abs o", "abs to", "rel o", "rel to", "rel gradients")
    rows = [{k: f"{v:.1e}" if isinstance(v, float) else v for k, v in row.items()} for row in table(args.device)]
    with open(args.csv, "w", newline="") if args.csv else sys.stdout as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
