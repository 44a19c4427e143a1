"""`attention`: checks, autocast, and the choice of a back end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Call, chosen
from .form import Form, normalised


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T + mask) v [B,H,N,D], differentiable in forward and reverse mode, and in both at once.

    q [B,H,N,D], k and v [B,Hk,M,D] of any strides, H a multiple of Hk. mask: lengths [B] of keys; bool (True: seen) or added
    numbers [B,M] or [B,H,N,M] with ones for what it does not hang on. causal: query i sees keys
    j <= i + M - N: the *last* query and key are aligned (torch's `is_causal` aligns the first; equal for N = M).
    scale: default D^-1/2. A query that sees no key gives 0. Under autocast the inputs take its dtype.

    backend: auto, triton, reference, chunked, sdpa, sdpa_math, xformers. A named one that can't serve raises ValueError and
    says which would; `auto` falls through to one that can.
    """
    q, k, v = _autocast(q, k, v)
    _check(q, k, v)
    form = Form(q.shape[3] ** -0.5 if scale is None else float(scale), causal, k.shape[2] - q.shape[2])
    duals = [forward_ad.unpack_dual(x) for x in (q, k, v)]
    tangents = tuple(None if d.tangent is None else d.tangent.to(q.dtype) for d in duals)
    call = Call((q, k, v), tuple(d.primal for d in duals), tangents, normalised(mask, q, k), form)
    return chosen(backend, call).run(call)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's own attention does: all but float64 in autocast's dtype."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip("qkv", (q, k, v)))
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(f"attention takes q [B,H,N,D], k and v [B,Hk,M,D], and got {shapes}: add or fold dimensions")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention takes one batch size, one head dim of q and k and the same keys in v: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q must be a multiple of those of k and v: {shapes}")
    if len({x.device for x in (q, k, v)}) > 1:
        raise ValueError(f"q is on {q.device}, k on {k.device} and v on {v.device}: move them to one")
    if len({x.dtype for x in (q, k, v)}) > 1 or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: cast them to one floating-point dtype")
