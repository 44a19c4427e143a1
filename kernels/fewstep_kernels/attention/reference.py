"""Attention, its tangent and the gradients of both, for a block of queries: the definition that every kernel is held to.

    s = c q k^T + mask,   p = softmax(s),   o = p v,   lse = ln sum exp s
    ds = c (tq k^T + q tk^T),   h = p (ds - sum p ds),   to = h v + p tv

With <x> = p (x - sum p x), the softmax's own derivative, and cotangents go, gt of the two outputs,

    b = gt v^T,   gD = <b>,   gS = <go v^T + gt tv^T + (b - sum p b)(ds - sum p ds)>
    gq = c (gS k + gD tk),  gk = c (gS^T q + gD^T tq),  gv = p^T go + h^T gt
    gtq = c gD k,  gtk = c gD^T q,  gtv = p^T gt

A row with no key to see has o = to = 0. Tensors are of the width that sums are kept in; heads of q, k and v are equal in number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .form import Form, added

Maybe = Tensor | None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Maybe, form: Form) -> tuple[Tensor, Tensor]:
    """o [B,H,n,D] and lse [B,H,n] of queries q [B,H,n,D]."""
    p, lse = probabilities(q, k, mask, form)
    return p @ v, lse


def backward(go: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """gq, gk, gv; the last two are what these queries add to them."""
    p, _ = probabilities(q, k, mask, form)
    gv = p.mT @ go
    gs = _centred(p, go @ v.mT).mul_(p).mul_(form.scale)
    return gs @ k, gs.mT @ q, gv


def pair(
    q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe, form: Form
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, to, lse and r = sum p ds."""
    p, lse = probabilities(q, k, mask, form)
    o, to, r = p @ v, torch.zeros_like(p[..., :1]) @ v[..., :1, :], torch.zeros_like(lse)
    ds = _turned(q, k, tq, tk, form)
    if tv is not None:
        to = p @ tv
    if ds is not None:
        r = _mean(p, ds)
        to = to + (ds - r) * p @ v
        r = r[..., 0]
    return o, to, lse, r


def pair_backward(
    go: Maybe, gt: Tensor, q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe, form: Form
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of <go, o> + <gt, to> in q, k, v, tq, tk, tv."""
    p, _ = probabilities(q, k, mask, form)
    ds = _turned(q, k, tq, tk, form)
    moved = torch.zeros_like(p) if ds is None else _centred(p, ds)
    b = _centred(p, gt @ v.mT)
    gs = moved * b
    gv = moved.mul_(p).mT @ gt
    gtv = p.mT @ gt
    if go is not None:
        gs += go @ v.mT
        gv += p.mT @ go
    if tv is not None:
        gs += gt @ tv.mT
    gs = _centred(p, gs).mul_(p).mul_(form.scale)
    gd = b.mul_(p).mul_(form.scale)
    gq, gk = gs @ k, gs.mT @ q
    if tk is not None:
        gq += gd @ tk
    if tq is not None:
        gk += gd.mT @ tq
    return gq, gk, gv, gd @ k, gd.mT @ q, gtv


def probabilities(q: Tensor, k: Tensor, mask: Maybe, form: Form) -> tuple[Tensor, Tensor]:
    """p [B,H,n,M] and lse [B,H,n]; p is 0 and lse minus infinity in a row that sees no key."""
    # Nothing is written in place on the way to a tangent: func.linearize folds what is constant and would write to it at each call.
    s = (q * form.scale) @ k.mT
    bias = added(mask, form, q.shape[2], k.shape[2], s)
    if bias is None:
        return torch.softmax(s, -1), torch.logsumexp(s, -1)
    s = s + bias
    lse = torch.logsumexp(s, -1)
    return torch.softmax(s, -1).masked_fill((lse == -torch.inf)[..., None], 0), lse


def _turned(q: Tensor, k: Tensor, tq: Maybe, tk: Maybe, form: Form) -> Maybe:
    """ds, or None where both tangents are."""
    if tq is None and tk is None:
        return None
    first = None if tq is None else (tq * form.scale) @ k.mT
    if tk is None:
        return first
    second = (q * form.scale) @ tk.mT
    return second if first is None else first + second


def _mean(p: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("...nm,...nm->...n", p, x)[..., None]


def _centred(p: Tensor, x: Tensor) -> Tensor:
    """x - sum p x, written into x."""
    return x.sub_(_mean(p, x))
