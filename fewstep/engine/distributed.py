"""Sums over processes. Roles are not wrapped in DDP: the stepping role's gradients are added up in buckets at the barrier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 32 * 1024 * 1024


def world() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 being the one that writes."""
    return dist.get_rank() if world() > 1 else 0


def wait() -> None:
    """Returns when every process has come here."""
    if world() > 1:
        dist.barrier()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds `.grad` over processes, in place, in flat buckets of one dtype.

    A parameter without a gradient has none on any process, since network calls never depend on data; it stays without, as
    in a single process, where the optimiser leaves it alone.
    """
    if world() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for p in parameters:
        if p.grad is None or isinstance(p.grad, DTensor):  # those of a sharded network are summed in its backward pass
            continue
        if bucket and (size > BUCKET_BYTES or p.grad.dtype != bucket[0].dtype):
            _sum_bucket(bucket)
            bucket, size = [], 0
        bucket.append(p.grad)
        size += p.grad.numel() * p.grad.element_size()
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: Sequence[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in bucket])
    dist.all_reduce(flat)
    for g, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
        g.copy_(summed.view_as(g))


def sum_tensors(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds named tensors over processes."""
    summed = {name: value.clone() for name, value in numbers.items()}
    if world() > 1:
        for value in summed.values():
            dist.all_reduce(value)
    return summed


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of ranks; every process has equally many."""
    if world() == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one process."""
    if world() == 1:
        return flag
    number = torch.tensor(float(flag), device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number.item())
