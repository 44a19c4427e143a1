"""Starts the Triton kernels: which calls they take, with which tiles, and what surrounds them."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .form import Form, Ops

Maybe = Tensor | None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISION = "ieee"  # of float32 products; Triton's default, tf32, costs 3e-4


def refuses(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernels cannot take such a call, or None."""
    if dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, not {dtype}".replace("torch.", "")
    if dim % 8 or not 8 <= dim <= 128:
        return f"takes head dims that are multiples of 8 up to 128, not {dim}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    if device.type != "cuda" and not interpreted():
        return f"needs a CUDA device, not {device.type}, or TRITON_INTERPRET=1 set before triton is imported"
    return None


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels: slow, anywhere, for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Maybe, form: Form) -> tuple[Tensor, Tensor]:
    """o and lse; see `form.Ops`."""
    o, _, lse, _ = pair(q, k, v, None, None, None, mask, form)
    return o, lse


def pair(
    q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe, form: Form
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, to, lse, r."""
    from .kernels import attend

    moved = any(t is not None for t in (tq, tk, tv))
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    to, r = (torch.empty_like(o), torch.empty_like(lse)) if moved else (o, lse)
    if not o.numel():
        return o, to, lse, r
    tensors, strides, constants, sizes = _arguments((q, k, v, tq, tk, tv), mask, form)
    tile = tiles(constants["DP"], q.dtype, moved, back=False)
    grid = (-(-q.shape[2] // tile["BM"]), q.shape[0] * q.shape[1])
    attend[grid](*tensors, o, to, lse, r, *strides, *sizes, **constants, **tile)
    return o, to, lse, r


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, o: Tensor, lse: Tensor, form: Form
) -> tuple[Maybe, ...]:
    """gq, gk, gv."""
    return pair_backward(go, None, q, k, v, None, None, None, mask, o, o, lse, lse, form)[:3]


def pair_backward(
    go: Maybe, gt: Maybe, q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe,
    o: Tensor, to: Tensor, lse: Tensor, r: Tensor, form: Form,
) -> tuple[Maybe, ...]:  # fmt: skip
    """Gradients of q, k, v, and of the tangents that are given."""
    from .kernels import keys_back, queries_back

    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, tq, tk, tv)]
    beta = _rows(gt, o)
    drop = _rows(go, o) + _rows(gt, to)
    if not q.numel() or not k.numel():
        return tuple(None if g is None else g.zero_() for g in grads)
    tensors, strides, constants, sizes = _arguments((q, k, v, tq, tk, tv, go, gt), mask, form)
    constants |= {"HAS_GO": go is not None, "HAS_GT": gt is not None}
    rows = (lse, r, drop, beta)
    tile = tiles(constants["DP"], q.dtype, gt is not None, back=True)
    gq, gk, gv, gtq, gtk, gtv = (q if g is None else g for g in grads)  # unused places take any pointer
    grid = (-(-q.shape[2] // tile["BM"]), q.shape[0] * q.shape[1])
    queries_back[grid](*tensors, *rows, gq, gtq, *strides, *sizes, **constants, **tile)
    grid = (-(-k.shape[2] // tile["BN"]), k.shape[0] * k.shape[1])
    keys_back[grid](*tensors, *rows, gk, gv, gtk, gtv, *strides, *sizes, **constants, **tile)
    return tuple(grads)


OPS = Ops(forward, backward, pair, pair_backward)


def tiles(width: int, dtype: torch.dtype, moved: bool, back: bool) -> dict[str, int]:
    """BM queries by BN keys, warps and stages, of head dims padded to `width`.

    By what ptxas says of registers for sm_90; not yet tuned on a GPU.
    """
    if interpreted():
        return {"BM": 32, "BN": 32}
    if dtype == torch.float32:
        return {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1}
    if back:
        side, warps = (32 if moved and width > 64 else 64), (8 if moved or width > 64 else 4)
        return {"BM": side, "BN": side, "num_warps": warps, "num_stages": 1 if moved else 2}
    if moved:
        return {"BM": 64, "BN": 32, "num_warps": 4 if width <= 64 else 8, "num_stages": 2}
    return {"BM": 128, "BN": 64, "num_warps": 4 if width <= 64 else 8, "num_stages": 3 if width <= 64 else 2}


def _arguments(tensors: tuple[Maybe, ...], mask: Maybe, form: Form) -> tuple[Any, Any, dict[str, Any], Any]:
    """Tensors with mask and lengths behind them, their strides, constants, and sizes, in the kernels' order."""
    q, k = tensors[0], tensors[1]
    assert q is not None and k is not None
    flags = dict(zip(("HAS_TQ", "HAS_TK", "HAS_TV"), (x is not None for x in tensors[3:6])))
    usable = [None if x is None else x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    given = [q if x is None else x for x in usable]
    strides = [s for x in usable for s in ((0, 0, 0) if x is None else x.stride()[:3])]
    lengths = mask.to(torch.int32).contiguous() if mask is not None and mask.ndim == 1 else None
    bias, bias_strides = _bias(mask) if lengths is None else (None, (0, 0))
    constants = {
        "D": q.shape[3],
        "DP": max(16, 1 << (q.shape[3] - 1).bit_length()),
        "CAUSAL": form.causal,
        "BIAS": bias is not None,
        "LENGTHS": lengths is not None,
        **flags,
        "INTERP": interpreted(),
        "PRECISION": PRECISION,
    }
    sizes = (q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], form.scale, form.shift)
    behind = (q if bias is None else bias, q if lengths is None else lengths)
    return (*given, *behind), (*strides, *bias_strides), constants, sizes


def _bias(mask: Maybe) -> tuple[Maybe, tuple[int, int]]:
    """A mask over keys as float32 [b, h, M], and its strides over batch and heads, 0 where one serves all."""
    if mask is None:
        return None, (0, 0)
    mask = mask[:, :, 0]
    mask = (
        mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    )
    mask = mask.float().contiguous()
    return mask, tuple(0 if n == 1 else s for n, s in zip(mask.shape[:2], mask.stride()[:2]))  # type: ignore[return-value]


def _rows(g: Maybe, x: Tensor) -> Tensor:
    """g.x of each row in float32, 0 without g."""
    if g is None:
        return x.new_zeros(x.shape[:3], dtype=torch.float32)
    return (g.float() * x.float()).sum(-1)
