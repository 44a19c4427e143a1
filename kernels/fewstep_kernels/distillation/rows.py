"""Triton kernels for the rows of logits of a chunk: one program a row, two or three sweeps over the vocabulary.

Logits come in the dtype of the heads (float32, float16 or bfloat16); sums run in float32, and the gradient overwrites
the student's logits. Not yet run on a GPU: they compile for one, and the interpreter shows that formulas and addresses
are right. The row stays in the L2 cache between sweeps.

Set TRITON_INTERPRET=1 before anything imports triton to run these on CPU tensors.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import RowOps
from .inputs import FLOOR, KINDS, Divergence

# The interpreter multiplies and stores bfloat16 wrongly, so stores round the bits themselves there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK, WARPS = 4096, 8  # for sm_90 these compile to 57 (reverse KL) to 106 (JSD) registers a thread, none spilled

_FLOOR = tl.constexpr(FLOOR)
_FORWARD_KL, _REVERSE_KL, _JSD = (tl.constexpr(KINDS.index(kind)) for kind in ("forward_kl", "reverse_kl", "jsd"))


def compare(z: Tensor, y: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """D(p, q) [C] of logits z, y [C, V], and its gradient in z / T in place of z."""
    z, y, n = z.contiguous(), y.contiguous(), z.shape[1]
    value = torch.empty(len(z), device=z.device)
    beta = divergence.beta if divergence.kind == "jsd" else 0.5  # the others do not read it; its logarithms are finite
    numbers = (1 / divergence.temperature, beta, math.log(beta), math.log1p(-beta))
    kind = KINDS.index(divergence.kind)
    _compare[(len(z),)](z, y, value, n, *numbers, KIND=kind, BLOCK=_block(n), INTERP=INTERPRETED, num_warps=WARPS)
    return value, z


def lse(z: Tensor, temperature: float) -> Tensor:
    """log sum exp(z / T) [C] of z [C, V]."""
    z, n = z.contiguous(), z.shape[1]
    out = torch.empty(len(z), device=z.device)
    _lse[(len(z),)](z, out, n, 1 / temperature, BLOCK=_block(n), num_warps=WARPS)
    return out


def spread(z: Tensor, temperature: float, lse: Tensor, mass: Tensor) -> Tensor:
    """mass exp(z / T - lse) [C, V] in place of z; lse, mass [C]."""
    z, lse, mass, n = z.contiguous(), lse.contiguous(), mass.contiguous(), z.shape[1]
    _spread[(len(z),)](z, lse, mass, n, 1 / temperature, BLOCK=_block(n), INTERP=INTERPRETED, num_warps=WARPS)
    return z


TRITON = RowOps(compare, lse, spread)


def _block(vocabulary: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocabulary))


@triton.jit
def _load(row, at, n, inv_t):
    """Logits / T in float32; words masked by -inf, and places beyond the row, are at the floor."""
    x = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32)
    return tl.maximum(x * inv_t, _FLOOR)


@triton.jit
def _store(row, at, n, x, INTERP: tl.constexpr):
    if INTERP and row.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    tl.store(row + at, x.to(row.dtype.element_ty), mask=at < n)


@triton.jit
def _normaliser(row, n, inv_t, BLOCK: tl.constexpr):
    """Largest logit m and log sum exp(x - m) of a row, in one sweep."""
    m = tl.full([], -3.0e38, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        x = _load(row, start + tl.arange(0, BLOCK), n, inv_t)
        larger = tl.maximum(m, tl.max(x, 0))
        total = total * tl.exp(m - larger) + tl.sum(tl.exp(x - larger), 0)
        m = larger
    return m, tl.log(total)


@triton.jit
def _log_mix(log_p, log_q, log_beta, log_rest):
    a, b = log_p + log_beta, log_q + log_rest
    larger = tl.maximum(a, b)
    return larger + tl.log(tl.exp(a - larger) + tl.exp(b - larger))


@triton.jit
def _compare(
    z,
    y,
    value,
    n,
    inv_t,
    beta,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * n
    y += row * n
    m_z, l_z = _normaliser(z, n, inv_t, BLOCK)
    m_y, l_y = _normaliser(y, n, inv_t, BLOCK)
    of_p = tl.full([], 0.0, tl.float32)
    of_q = tl.full([], 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        log_q = _load(z, at, n, inv_t) - m_z - l_z
        log_p = _load(y, at, n, inv_t) - m_y - l_y
        q, p = tl.exp(log_q), tl.exp(log_p)
        if KIND == _FORWARD_KL:
            of_p += tl.sum(p * (log_p - log_q), 0)
            _store(z, at, n, q - p, INTERP)
        elif KIND == _REVERSE_KL:
            of_q += tl.sum(q * (log_q - log_p), 0)
        else:
            log_m = _log_mix(log_p, log_q, log_beta, log_rest)
            of_p += tl.sum(p * (log_p - log_m), 0)
            of_q += tl.sum(q * (log_q - log_m), 0)
    if KIND == _FORWARD_KL:
        tl.store(value + row, of_p)
    elif KIND == _REVERSE_KL:
        tl.store(value + row, of_q)
    else:
        tl.store(value + row, beta * of_p + (1 - beta) * of_q)
    if KIND != _FORWARD_KL:  # these gradients need the expectation first; the rows are still in the L2 cache
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            log_q = _load(z, at, n, inv_t) - m_z - l_z
            log_p = _load(y, at, n, inv_t) - m_y - l_y
            if KIND == _REVERSE_KL:
                _store(z, at, n, tl.exp(log_q) * (log_q - log_p - of_q), INTERP)
            else:
                log_m = _log_mix(log_p, log_q, log_beta, log_rest)
                _store(z, at, n, (1 - beta) * tl.exp(log_q) * (log_q - log_m - of_q), INTERP)


@triton.jit
def _lse(z, out, n, inv_t, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m, log_total = _normaliser(z + row * n, n, inv_t, BLOCK)
    tl.store(out + row, m + log_total)


@triton.jit
def _spread(z, lse, mass, n, inv_t, BLOCK: tl.constexpr, INTERP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * n
    log_total, share = tl.load(lse + row), tl.load(mass + row)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _store(z, at, n, share * tl.exp(_load(z, at, n, inv_t) - log_total), INTERP)
