"""The reference over one block of queries at a time: memory O(N) for output, tangent and the gradients of both.

Inputs are widened to float32 (float64 stays), so half precision costs rounding of inputs and outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .form import Form, Ops, rows_of

Maybe = Tensor | None
Rows = Callable[[Tensor, Tensor], int]

ROWS = 256
ELEMENTS = 1 << 21  # of one block of scores: 8 MB of float32, a few of which live at a time


def bounded(q: Tensor, k: Tensor) -> int:
    """Rows of a block: as many as keep its scores within `ELEMENTS`, between 16 and 256."""
    row = max(1, q.shape[0] * q.shape[1] * k.shape[2])
    return min(ROWS, max(16, ELEMENTS // row))


def whole(q: Tensor, _k: Tensor) -> int:
    """All rows in one block: the reference itself."""
    return max(1, q.shape[2])


def forward(rows: Rows, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, form: Form) -> tuple[Tensor, Tensor]:
    """o and lse; see `form.Ops`."""
    wq, wk, wv = _wide(q, k, v)
    o, lse = _joined(
        reference.forward(wq[:, :, block], wk, wv, seen, at) for block, seen, at in _blocks(rows, q, k, mask, form)
    )
    return o.to(q.dtype), lse


def backward(
    rows: Rows, go: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, _o: Tensor, _lse: Tensor, form: Form
) -> tuple[Tensor, ...]:
    """gq, gk, gv; probabilities are found anew."""
    wgo, wq, wk, wv = _wide(go, q, k, v)
    grads = [torch.zeros_like(x) for x in (wq, wk, wv)]
    for block, seen, at in _blocks(rows, q, k, mask, form):
        found = reference.backward(wgo[:, :, block], wq[:, :, block], wk, wv, seen, at)
        _gather(grads, found, block, of_queries=(0,))
    return _narrow(grads, (q, k, v))


def pair(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe, form: Form
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, to, lse, r."""
    wq, wk, wv, wtq, wtk, wtv = _wide(q, k, v, tq, tk, tv)
    o, to, lse, r = _joined(
        reference.pair(wq[:, :, block], wk, wv, _cut(wtq, block), wtk, wtv, seen, at)
        for block, seen, at in _blocks(rows, q, k, mask, form)
    )
    return o.to(q.dtype), to.to(q.dtype), lse, r


def pair_backward(
    rows: Rows, go: Maybe, gt: Tensor, q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe,
    _o: Tensor, _to: Tensor, _lse: Tensor, _r: Tensor, form: Form,
) -> tuple[Maybe, ...]:  # fmt: skip
    """Gradients of q, k, v, and of the tangents that are given."""
    wgo, wgt, wq, wk, wv, wtq, wtk, wtv = _wide(go, gt, q, k, v, tq, tk, tv)
    grads = [torch.zeros_like(x) for x in (wq, wk, wv, wq, wk, wv)]
    for block, seen, at in _blocks(rows, q, k, mask, form):
        cut = (_cut(wgo, block), wgt[:, :, block], wq[:, :, block], wk, wv, _cut(wtq, block), wtk, wtv)
        _gather(grads, reference.pair_backward(*cut, seen, at), block, of_queries=(0, 3))
    return _narrow(grads, (q, k, v, tq, tk, tv))


def ops(rows: Rows) -> Ops:
    """The four functions with blocks of `rows(q, k)` queries."""
    return Ops(partial(forward, rows), partial(backward, rows), partial(pair, rows), partial(pair_backward, rows))


def _blocks(rows: Rows, q: Tensor, k: Tensor, mask: Maybe, form: Form) -> Iterator[tuple[slice, Maybe, Form]]:
    n = rows(q, k)
    for first in range(0, max(1, q.shape[2]), n):  # one empty block where there are no queries
        block = slice(first, first + n)
        yield block, rows_of(mask, block), form.at(first)


def _wide(*tensors: Maybe) -> list[Any]:
    """In float32 or float64 and contiguous, so that no block's product copies all keys."""
    return [None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)).contiguous() for x in tensors]


def _cut(x: Maybe, block: slice) -> Maybe:
    return None if x is None else x[:, :, block]


def _joined(blocks: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    # func.linearize folds constants, an empty tensor that is written into among them: so blocks are joined, not written
    return [torch.cat(parts, 2) for parts in zip(*blocks)]


def _gather(grads: list[Tensor], found: tuple[Tensor, ...], block: slice, of_queries: tuple[int, ...]) -> None:
    for i, (whole_grad, part) in enumerate(zip(grads, found)):
        if i in of_queries:
            whole_grad[:, :, block] = part
        else:
            whole_grad += part


def _narrow(grads: list[Tensor], like: tuple[Maybe, ...]) -> tuple[Any, ...]:
    return tuple(None if x is None else g.to(x.dtype) for g, x in zip(grads, like))
