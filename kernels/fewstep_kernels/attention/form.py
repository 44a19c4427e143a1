"""What an attention is apart from its tensors: scale, causality, and which keys a query may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """scale: c of s = c q.k. causal: query i sees keys j <= i + shift; shift = M - N aligns the last query and key."""

    scale: float
    causal: bool = False
    shift: int = 0

    def at(self, first: int) -> Form:
        """The form of the queries from number `first` on."""
        return replace(self, shift=self.shift + first)


class Ops(NamedTuple):
    """One implementation. q, tq, o, to [B,H,N,D], k, v, tk, tv [B,Hk,M,D], lse, r [B,H,N]; tangents and cotangents may be None.

    forward(q, k, v, mask, form) -> o, lse
    backward(go, q, k, v, mask, o, lse, form) -> gq, gk, gv
    pair(q, k, v, tq, tk, tv, mask, form) -> o, to, lse, r
    pair_backward(go, gt, q, k, v, tq, tk, tv, mask, o, to, lse, r, form) -> the six gradients; None of a tangent that is None
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    pair: Callable[..., Any]
    pair_backward: Callable[..., Any]


def normalised(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask as lengths [B] (integers), or as bool (True: seen) or added numbers [B or 1, H or 1, N or 1, M].

    Takes lengths [B], [B, M] and four dimensions that broadcast. Raises ValueError for any other form.
    """
    if mask is None:
        return None
    (batch, heads, rows, _), keys = q.shape, k.shape[2]
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device} and q on {q.device}: move the mask")
    if mask.shape == (batch,) and not mask.is_floating_point() and mask.dtype != torch.bool:
        return mask
    if mask.shape == (batch, keys):
        mask = mask[:, None, None]
    said = mask.dtype == torch.bool or mask.is_floating_point()
    if mask.ndim == 4 and said and all(n in (1, m) for n, m in zip(mask.shape, (batch, heads, rows, keys))):
        return mask.expand(*mask.shape[:3], keys)
    raise ValueError(
        f"mask of shape {list(mask.shape)} and {mask.dtype} for q of [{batch}, {heads}, {rows}, D] and {keys} keys: give "
        f"integer lengths [B], or bool (True: seen) or added numbers of [B, {keys}] or [B or 1, H or 1, N or 1, {keys}]"
    )


def rows_of(mask: Tensor | None, block: slice) -> Tensor | None:
    """The part of a normalised mask that is about the queries `block`."""
    per_row = mask is not None and mask.ndim == 4 and mask.shape[2] > 1
    return mask[:, :, block] if per_row and mask is not None else mask


def added(mask: Tensor | None, form: Form, rows: int, keys: int, like: Tensor) -> Tensor | None:
    """What is added to the scores, broadcasting to [B, H, N, M]: 0 or minus infinity, and an additive mask's numbers."""
    bias = None
    if mask is not None:
        bias = _bias(mask, keys, like)
    if form.causal:
        allowed = torch.ones(rows, keys, dtype=torch.bool, device=like.device).tril(form.shift)
        ahead = like.new_zeros(rows, keys).masked_fill(~allowed, -torch.inf)
        bias = ahead if bias is None else bias + ahead
    return bias


def _bias(mask: Tensor, keys: int, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask.to(like.dtype)
    if mask.ndim == 1:
        mask = (torch.arange(keys, device=mask.device) < mask[:, None])[:, None, None]
    return like.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
