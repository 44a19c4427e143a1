"""Calls of attention that the tests share, and an exact answer that no back end had a part in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

F64 = torch.float64
NAMES = ("q", "k", "v")


def tensors(
    rows: int = 7, keys: int = 9, dim: int = 8, heads: int = 2, groups: int = 1, batch: int = 2, seed: int = 0,
    dtype: torch.dtype = F64, sets: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """q, k, v, and `sets` - 1 more of their like (tangents), of unit normals."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, rows, dim), *[(batch, heads // groups, keys, dim)] * 2] * sets
    return tuple(torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention as its formula, row by row, of a mask in any form that `attention` takes; differentiable any number of times."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    (n, d), m = q.shape[2:], k.shape[2]
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) / d**0.5
    seen = torch.ones(n, m, dtype=torch.bool)
    if causal:
        seen = torch.arange(m)[None] <= torch.arange(n)[:, None] + m - n
    if mask is not None and mask.ndim == 1:
        seen = seen & (torch.arange(m) < mask[:, None])[:, None, None]
    elif mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        s, seen = (s, seen & mask) if mask.dtype == torch.bool else (s + mask.to(s.dtype), seen)
    seen = seen.expand(s.shape)
    weight = torch.where(seen, (s - s.detach().amax(-1, keepdim=True)).exp(), torch.zeros_like(s))
    total = weight.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhmd->bhnd", weight / torch.where(total == 0, torch.ones_like(total), total), v)


KEYS = 9
BOOL = torch.rand(2, KEYS, generator=torch.Generator().manual_seed(1)) < 0.6
FULL = torch.rand(2, 1, 7, KEYS, generator=torch.Generator().manual_seed(2)) < 0.6
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "lengths": {"mask": torch.tensor([0, 5])},
    "keys": {"mask": BOOL},
    "added": {"mask": torch.where(BOOL, 0.0, -10000.0)[:, None, None]},
    "rows": {"mask": FULL},
    "added rows, causal": {"mask": torch.where(FULL, 0.3, -2.0), "causal": True},
}


def both(
    f: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], weights: tuple[float, float]
) -> list[Tensor]:
    """Output and tangent of f, and the gradients in primals and tangents of a fixed functional of both."""
    primals = tuple(x.detach().requires_grad_() for x in primals)
    tangents = tuple(x.detach().requires_grad_() for x in tangents)
    o, to = torch.func.jvp(f, primals, tangents)
    loss = weights[0] * (o * o.detach().cos()).sum() + weights[1] * (to * to.detach().cos()).sum()
    grads = torch.autograd.grad(loss, (*primals, *tangents), allow_unused=True)
    return [o, to, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, (*primals, *tangents)))]


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Frobenius, in float64; |a| where b is 0."""
    gap, size = (a.double() - b.double()).norm(), b.double().norm()
    return (gap / size if size > 0 else gap).item()
