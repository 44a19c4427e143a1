"""Autograd around an implementation: backward, backward of the backward, forward mode, and vmap, each in O(N) memory.

`Attend` is o(q, k, v). `Pair` is (o, to), differentiable once. The backward of `Attend` is a function too, G(go, q, k, v), and
needs no kernel of its own to be differentiated. With <u, G> = <go, to(q, k, v, u)> its cotangent u gives to(u) for go, and
for q, k, v the gradients of <go, to> (a `pair_backward` with gt = go); its tangent, by the symmetry of second derivatives, is
the same `pair_backward` with u the inputs' tangents, go the tangent of go and gt = go.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .form import Form, Ops

Maybe = Tensor | None
NESTED = "attention has one forward-mode level: for a jvp of a jvp or a gradient of a tangent's gradient, write backend='sdpa_math'"


class Attend(Function):
    """o and lse; lse carries no gradient."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Maybe, form: Form, ops: Ops) -> Any:
        return ops.forward(q, k, v, mask, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.form, ctx.ops = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, go: Maybe, _: Any) -> Any:
        if go is None:
            return (None,) * 6
        return *Gradient.apply(go, *ctx.saved_tensors, ctx.form, ctx.ops), None, None, None

    @staticmethod
    def jvp(ctx: Any, tq: Maybe, tk: Maybe, tv: Maybe, *_: Any) -> Any:
        q, k, v, mask = ctx.saved_tensors
        tangents = (None if t is None else t.to(x.dtype) for t, x in zip((tq, tk, tv), (q, k, v)))
        return Pair.apply(q, k, v, *tangents, mask, ctx.form, ctx.ops)[1], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _folded(Attend, info, in_dims, args)


class Gradient(Function):
    """gq, gk, gv for a cotangent go of o."""

    @staticmethod
    def forward(
        go: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, o: Tensor, lse: Tensor, form: Form, ops: Ops
    ) -> Any:
        return ops.backward(go, q, k, v, mask, o, lse, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004  (torch's signature)
        go, q, k, v, mask, _, _, ctx.form, ctx.ops = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(go, q, k, v, mask)
        ctx.save_for_forward(go, q, k, v, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *u: Maybe) -> Any:
        go, q, k, v, mask = ctx.saved_tensors
        if all(x is None for x in u):
            return (None,) * 9
        o, to, lse, r = ctx.ops.pair(q, k, v, *u, mask, ctx.form)
        found = ctx.ops.pair_backward(None, go, q, k, v, *u, mask, o, to, lse, r, ctx.form)
        return to, *found[:3], *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, tgo: Maybe, tq: Maybe, tk: Maybe, tv: Maybe, *_: Any) -> Any:
        go, q, k, v, mask = ctx.saved_tensors
        o, to, lse, r = Pair.apply(q, k, v, tq, tk, tv, mask, ctx.form, ctx.ops)
        return ctx.ops.pair_backward(tgo, go, q, k, v, tq, tk, tv, mask, o, to, lse, r, ctx.form)[:3]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _folded(Gradient, info, in_dims, args)


class Pair(Function):
    """o, to, lse, r. A tangent that is None is zero and costs nothing."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, tq: Maybe, tk: Maybe, tv: Maybe, mask: Maybe, form: Form, ops: Ops
    ) -> Any:
        return ops.pair(q, k, v, tq, tk, tv, mask, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.form, ctx.ops = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, go: Maybe, gt: Maybe, *_: Any) -> Any:
        q, k, v, tq, tk, tv, mask, o, to, lse, r = ctx.saved_tensors
        if go is None and gt is None:
            return (None,) * 9
        if gt is None:
            return *ctx.ops.backward(go, q, k, v, mask, o, lse, ctx.form), *(None,) * 6
        found = ctx.ops.pair_backward(go, gt, q, k, v, tq, tk, tv, mask, o, to, lse, r, ctx.form)
        return *found, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NESTED)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _folded(Pair, info, in_dims, args)


def _folded(function: Any, info: Any, in_dims: Any, args: tuple[Any, ...]) -> Any:
    """Runs `function` with the mapped dimension as part of the batch."""
    size = info.batch_size
    batch = (
        max(x.shape[0] for x in (_front(x, d, size) for x, d in zip(args, in_dims)) if isinstance(x, Tensor)) // size
    )
    out = function.apply(*(_front(x, d, size, batch) for x, d in zip(args, in_dims)))
    return tuple(x.unflatten(0, (size, batch)) for x in out), (0,) * len(out)


def _front(x: Any, dim: int | None, size: int, batch: int | None = None) -> Any:
    """[B, ...] with a mapped dimension, or without one, as [size * B, ...]."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    if batch is not None and x.shape[1] != batch:  # a mask that is one for the whole batch
        x = x.expand(size, batch, *x.shape[2:])
    return x.flatten(0, 1)
