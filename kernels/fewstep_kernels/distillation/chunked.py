"""The distillation loss without [n, V] logits: chunks of rows, whose gradients are made in the forward pass.

With q and p the softmaxes of z = student logits / T and y = teacher logits / T, the gradient of a row in z is

    forward KL   q - p
    reverse KL   q (w - E_q w),             w = log q - log p
    JSD          (1 - beta) q (w - E_q w),  w = log q - log m
    top k        the same on K + 1 buckets; the last one's gradient is shared out by softmax over the words in it

and a chunk with gradients G [C, V] adds G W / T to the gradient of its hidden states and G^T h / T to that of the
weights. Nothing of size [n, V] is ever made, and the backward pass multiplies by the incoming scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import FLOOR, Divergence, Head, Teacher, TopK, teacher_buckets, teacher_logits, wide


@dataclass(frozen=True)
class RowOps:
    """What a back end does with the logits of a chunk, [C, V] as they come out of the heads. All may overwrite z and y.

    compare  (z, y, divergence) -> D(p, q) [C] and its gradient in z / T [C, V]
    lse      (z, T) -> log sum exp(z / T) [C]
    spread   (z, T, lse [C], mass [C]) -> mass exp(z / T - lse) [C, V]
    """

    compare: Callable[[Tensor, Tensor, Divergence], tuple[Tensor, Tensor]]
    lse: Callable[[Tensor, float], Tensor]
    spread: Callable[[Tensor, float, Tensor, Tensor], Tensor]


def fused(
    student: Head,
    teacher: Teacher,
    divergence: Divergence,
    keep: Tensor,
    total: Tensor,
    chunk: int | None,
    ops: RowOps,
) -> Tensor:
    """As `reference.reference`, `chunk` rows at a time; gradients of first order only."""
    hidden, weight, bias = student.hidden, student.weight, student.bias
    chunk = chunk or rows_per_chunk(len(hidden), len(weight), hidden.shape[1], hidden.is_cuda)
    return _Fused.apply(hidden, weight, bias, teacher, divergence, keep, divergence.factor / total, chunk, ops)


def rows_per_chunk(n: int, vocabulary: int, features: int, on_gpu: bool = False) -> int:
    """The power of two nearest to n D / V, within 256 (128 off the GPU) and 4096.

    The logits of a chunk then take about as much room as all hidden states. On two CPU cores fewer rows than 128 cost time.
    """
    return 2 ** round(math.log2(min(max(n * features / vocabulary, 256 if on_gpu else 128), 4096)))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Teacher,
        divergence: Divergence,
        keep: Tensor,
        scale: Tensor,
        chunk: int,
        ops: RowOps,
    ) -> Tensor:
        student = Head(hidden, weight, bias)
        gradients = _Gradients(student, *ctx.needs_input_grad[:3])
        loss = torch.zeros_like(scale)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            value, gradient = _rows(student, teacher, divergence, keep, rows, ops)
            loss += value.masked_fill(~keep[rows], 0).sum()
            gradients.add(rows, gradient, keep[rows])
            del gradient  # before the next chunk makes its logits
        ctx.save_for_backward(*gradients.done(scale / divergence.temperature))
        return loss * scale

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: these gradients would pass for constants
            raise RuntimeError("these gradients cannot be differentiated again: write backend='reference'")
        gradients = (None if g is None else g * incoming.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, *(None,) * 6)


class _Gradients:
    """Gradients in hidden [n, D], weight [V, D] and bias [V], those that are wanted; float32 or better while they add up."""

    def __init__(self, student: Head, hidden: bool, weight: bool, bias: bool):
        self.student = student
        self.hidden = torch.empty_like(student.hidden) if hidden else None
        self.weight = _zeros(student.weight) if weight else None
        self.bias = _zeros(student.bias) if bias and student.bias is not None else None

    def add(self, rows: slice, gradient: Tensor, keep: Tensor) -> None:
        """gradient [C, V] in the logits. Rows outside `keep` [C] have hidden states 0, made by a mask that stops the rest."""
        hidden, weight = self.student.hidden[rows], self.student.weight
        if self.hidden is not None:
            torch.mm(gradient.to(weight.dtype), weight, out=self.hidden[rows])
        if self.weight is not None:
            _add_product(self.weight, gradient, hidden)
        if self.bias is not None:
            self.bias += keep.to(self.bias.dtype) @ wide(gradient)

    def done(self, scale: Tensor) -> tuple[Tensor | None, ...]:
        """All times `scale`, in the dtypes of what they are the gradients of."""
        weight, bias = self.student.weight, self.student.bias
        return (
            None if self.hidden is None else self.hidden.mul_(scale),
            None if self.weight is None else self.weight.mul_(scale).to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.mul_(scale).to(bias.dtype),
        )


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V, D] += gradient [C, V]^T hidden [C, D], never rounded below float32 in between."""
    has_out_dtype = gradient.is_cuda and torch.__version__ >= "2.8"
    if has_out_dtype and gradient.dtype == hidden.dtype != total.dtype:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(wide(gradient).T, wide(hidden))


def _rows(
    student: Head, teacher: Teacher, divergence: Divergence, keep: Tensor, rows: slice, ops: RowOps
) -> tuple[Tensor, Tensor]:
    """D [C] and its gradient in z / T [C, V] of the tokens `rows`."""
    z = student.logits(rows)
    if isinstance(teacher, TopK):
        return _top_rows(z, teacher, divergence, rows, ops)
    return ops.compare(z, teacher_logits(teacher, rows, keep), divergence)


def _top_rows(z: Tensor, top: TopK, divergence: Divergence, rows: slice, ops: RowOps) -> tuple[Tensor, Tensor]:
    """The tail's logarithm is summed from its own words: 1 - sum q would lose all digits of a small one."""
    ids, t = top.ids[rows], divergence.temperature
    words, log_p = wide(z.gather(-1, ids)) / t, teacher_buckets(top, rows)
    if top.rest == "drop":
        value, gradient = _compare(words, log_p, divergence)
        return value, z.zero_().scatter_(-1, ids, gradient.to(z.dtype))
    z.scatter_(-1, ids, -math.inf)
    others = ops.lse(z, t)
    value, gradient = _compare(torch.cat([words, others[:, None]], -1), log_p, divergence)
    z = ops.spread(z, t, others, gradient[:, -1])
    return value, z.scatter_(-1, ids, gradient[:, :-1].to(z.dtype))


def _compare(z: Tensor, log_p: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """D [C] and its gradient in z [C, V], both arguments overwritten; z and log p at the loss's temperature."""
    return _COMPARE[divergence.kind](_log_softmax_(z), log_p, divergence.beta)


def _forward_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value = (log_p.sub_(log_q).mul_(p)).sum(-1)
    return value, log_q.exp_().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    w = torch.sub(log_q, log_p, out=log_p)
    return _expectation(log_q.exp_(), w)


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = log_p + math.log(beta)
    torch.logaddexp(log_m, log_q + math.log1p(-beta), out=log_m)
    of_p = (log_p.exp() * log_p.sub_(log_m)).sum(-1)
    of_q, gradient = _expectation(log_q.exp(), log_q.sub_(log_m))
    return beta * of_p + (1 - beta) * of_q, gradient.mul_(1 - beta)


def _expectation(q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """E_q w [C], and q (w - E_q w) [C, V] in place of w."""
    mean = (q * w).sum(-1)
    return mean, w.sub_(mean[:, None]).mul_(q)


_COMPARE = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _log_softmax_(x: Tensor) -> Tensor:
    """In place, and from the largest logit, so that large logits lose no digits."""
    x -= x.amax(-1, keepdim=True)
    x -= x.exp().sum(-1, keepdim=True).log()
    return x.clamp_min_(FLOOR)


def _torch_compare(z: Tensor, y: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    t = divergence.temperature
    return _compare(wide(z).div_(t), _log_softmax_(wide(y).div_(t)), divergence)


def _torch_lse(z: Tensor, t: float) -> Tensor:
    return (wide(z) / t).clamp_min_(FLOOR).logsumexp(-1)


def _torch_spread(z: Tensor, t: float, lse: Tensor, mass: Tensor) -> Tensor:
    return wide(z).div_(t).clamp_min_(FLOOR).sub_(lse[:, None]).exp_().mul_(mass[:, None])


TORCH = RowOps(_torch_compare, _torch_lse, _torch_spread)
