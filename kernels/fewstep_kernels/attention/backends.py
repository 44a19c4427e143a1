"""The back ends of attention by name: what each refuses, and how each runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import chunked
from .form import Form, Ops, added
from .function import Attend, Pair

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One attention, checked and in its normal form. `primals` and `tangents` of q, k, v; all tangents None: none asked for."""

    tensors: tuple[Tensor, Tensor, Tensor]
    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor | None, ...]
    mask: Tensor | None
    form: Form

    @property
    def moved(self) -> bool:
        """Whether a tangent flows in."""
        return any(t is not None for t in self.tangents)

    @property
    def dims(self) -> tuple[int, int]:
        """Head dimension of q and k, and of v."""
        return self.tensors[0].shape[3], self.tensors[2].shape[3]


class Backend(NamedTuple):
    """refuses: why it can't serve a call, or None. run: the output."""

    refuses: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]


def chosen(name: str, call: Call) -> Backend:
    """The back end `name`. Raises ValueError with the reason and the names that would serve."""
    if name == "auto":
        name = automatic(call)
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend '{name}': known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].refuses(call)
    if reason:
        others = [other for other, backend in BACKENDS.items() if not backend.refuses(call)]
        raise ValueError(f"attention backend '{name}' {reason}: write one of {', '.join(others)}, or auto")
    return BACKENDS[name]


def automatic(call: Call) -> str:
    """torch's own for a plain call; for a tangent, or determinism on a GPU, the kernel once it is proven, else `chunked`."""
    q = call.tensors[0]
    if not call.moved and not (q.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return "sdpa"
    half = (
        q.dtype != torch.float32
    )  # exact float32 products leave Triton's tiles no registers: cuBLAS has them in `chunked`
    if q.is_cuda and half and not _triton_refuses(call) and proven(q.device, q.dtype, q.shape[3]):
        return "triton"
    return "sdpa_math" if _differentiable(call.mask) else "chunked"


@cache
def proven(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernels compile on `device` and agree with the reference on one small call; found once, said in the log."""
    from .launch import OPS

    try:
        error = disagreement(OPS, device, dtype, dim)
    except Exception as reason:  # a compiler may fail in any way, and `chunked` serves then
        log.warning("attention on %s, %s, head dim %d: chunked (triton failed: %s)", device, dtype, dim, reason)
        return False
    good = error < {torch.float32: 1e-4, torch.float16: 5e-3}.get(dtype, 3e-2)
    log.log(
        logging.INFO if good else logging.WARNING,
        "attention on %s, %s, head dim %d: %s (triton differs from the reference by %.1e)",
        *(device, dtype, dim, "triton" if good else "chunked", error),
    )
    return good


def disagreement(ops: Ops, device: torch.device, dtype: torch.dtype, dim: int) -> float:
    """The largest relative Frobenius error of output, tangent and gradients of `ops` against the reference on one small call."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, tq, tk, tv, go, gt = (
        torch.randn(1, 2, n, dim, generator=generator).to(device, dtype) for n in (70, 90, 90, 70, 90, 90, 70, 70)
    )
    form, worst = Form(dim**-0.5, causal=True, shift=20), 0.0
    exact = REFERENCE
    found, right = (f.pair(q, k, v, tq, tk, tv, None, form) for f in (ops, exact))
    pairs = list(zip(found[:2], right[:2]))
    said = (go, gt, q, k, v, tq, tk, tv, None)
    pairs += zip(ops.pair_backward(*said, *found, form), exact.pair_backward(*said, *right, form))
    pairs += zip(*(f.backward(go, q, k, v, None, x[0], x[2], form) for f, x in ((ops, found), (exact, right))))
    for a, b in pairs:
        worst = max(worst, ((a.double() - b.double()).norm() / b.double().norm()).item())
    return worst


# ---- ours


REFERENCE, CHUNKED = chunked.ops(chunked.whole), chunked.ops(chunked.bounded)


def _differentiable(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    return mask.requires_grad or forward_ad.unpack_dual(mask).tangent is not None if mask.is_floating_point() else False


def _mask_refused(call: Call) -> str | None:
    return "gives no gradient to a mask" if _differentiable(call.mask) else None


def _run(ops: Ops, grouped: bool, call: Call) -> Tensor:
    """One pass for output and tangent where a tangent flows in and no graph is built.

    With a graph, `Attend`'s own rule finds the tangent, a third more work: a gradient taken inside of the forward mode must carry
    its tangent, and `Pair`, which is given primals, would drop it without a word.
    """
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in call.tensors)
    if not call.moved or graph:
        return Attend.apply(*(_own(x, call, grouped) for x in call.tensors), call.mask, call.form, ops)[0]
    tensors = [None if x is None else _own(x, call, grouped) for x in (*call.primals, *call.tangents)]
    o, to, _, _ = Pair.apply(*tensors, call.mask, call.form, ops)
    return forward_ad.make_dual(o, to)


def _own(x: Tensor, call: Call, grouped: bool) -> Tensor:
    """k and v with as many heads as q has, unless the implementation knows groups."""
    heads = call.tensors[0].shape[1]
    return x if grouped or x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


# ---- the kernels


def _triton_refuses(call: Call) -> str | None:
    from .launch import refuses

    q, dims = call.tensors[0], call.dims
    if dims[0] != dims[1]:
        return f"takes one head dim, and got {dims[0]} of q, k and {dims[1]} of v"
    if call.mask is not None and call.mask.ndim == 4 and call.mask.shape[2] > 1:
        return "takes masks over keys, and this one differs from query to query"
    return _mask_refused(call) or refuses(q.device, q.dtype, dims[0])


def _run_triton(call: Call) -> Tensor:
    from .launch import OPS

    return _run(OPS, True, call)


# ---- torch's and xformers'


def _sdpa(call: Call) -> Tensor:
    q, k, v = call.tensors
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    square = call.form.causal and call.mask is None and q.shape[2] == k.shape[2]
    bias = None if square else added(call.mask, call.form, q.shape[2], k.shape[2], q)
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=square, scale=call.form.scale, **grouped)


def _sdpa_math(call: Call) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa(call)


def _sdpa_refuses(call: Call) -> str | None:
    return "has no forward mode in torch" if call.moved else None


def _xformers_refuses(call: Call) -> str | None:
    q = call.tensors[0]
    if call.moved:
        return "has no forward mode"
    if call.mask is not None:
        return "is called without masks here"
    return _xformers_fails(q.device, q.dtype, q.shape[3])


@cache
def _xformers_fails(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why one tiny call does not run: the package imports where its operators are missing."""
    try:
        from xformers.ops import memory_efficient_attention

        x = torch.zeros(1, 8, 1, dim, device=device, dtype=dtype)
        memory_efficient_attention(x, x, x)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as reason:
        return f"does not run here ({str(reason).strip().splitlines()[0]})"
    return None


def _xformers(call: Call) -> Tensor:
    from xformers.ops import LowerTriangularFromBottomRightMask, memory_efficient_attention

    q, k, v = (_own(x, call, False).transpose(1, 2) for x in call.tensors)
    bias = LowerTriangularFromBottomRightMask() if call.form.causal else None
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=call.form.scale).transpose(1, 2)


BACKENDS: dict[str, Backend] = {
    "triton": Backend(_triton_refuses, _run_triton),
    "reference": Backend(_mask_refused, partial(_run, REFERENCE, False)),
    "chunked": Backend(_mask_refused, partial(_run, CHUNKED, False)),
    "sdpa": Backend(_sdpa_refuses, _sdpa),
    "sdpa_math": Backend(lambda _: None, _sdpa_math),
    "xformers": Backend(_xformers_refuses, _xformers),
}
