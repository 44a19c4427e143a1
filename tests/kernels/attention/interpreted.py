"""The Triton kernels in Triton's interpreter against float64: run by `test_interpreter.py` in a process of its own.

Tiles are 32 x 32 there, and sizes that are no multiple of it, so that every kernel meets a full tile and a ragged one.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fewstep_kernels.attention import attention, launch
from fewstep_kernels.attention.form import Form
from torch import Tensor

from .cases import both, exact, relative, tensors

BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
LONG, SHORT = 40, 7
KEYS = torch.rand(1, LONG, generator=torch.Generator().manual_seed(1)) < 0.6


def agree(primals, moved, weights=(1.0, 1.0), **said) -> None:
    """Output, tangent and all gradients are within the bounds, and within twice what torch's formula loses."""
    found = both(lambda *x: attention(*x, backend="triton", **said), primals, moved, weights)
    eager = both(lambda *x: attention(*x, backend="sdpa_math", **said), primals, moved, weights)
    wide = (tuple(x.double() for x in some) for some in (primals, moved))
    right = both(lambda *x: exact(*x, **said), *wide, weights)
    for i, (a, b, c) in enumerate(zip(found, eager, right, strict=True)):
        bound = BOUND[a.dtype] * (1.0 if i < 2 else 2.5)
        if c.norm() < 1e-12:  # a single key: its score moves nothing
            assert a.norm() < 1e-5, i
            continue
        assert relative(a, c) < bound, i
        assert b.isnan().any() or relative(a, c) < 2 * relative(b, c) + 1e-6, (
            i
        )  # torch's gradient of an empty row is NaN


@pytest.mark.parametrize("dim, dtype", [*product((32, 64, 72, 80, 96, 128), (torch.float32,)), (40, torch.float16),
                                        (72, torch.float16), (64, torch.bfloat16), (96, torch.bfloat16)])  # fmt: skip
def test_head_dims_and_dtypes(dim, dtype):
    some = tensors(SHORT, LONG, dim, 1, batch=1, sets=2, dtype=dtype)
    agree(some[:3], some[3:])


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_a_loss_on_the_output_or_on_the_tangent_alone(weights):
    some = tensors(SHORT, LONG, 32, 1, batch=1, sets=2, dtype=torch.float32)
    agree(some[:3], some[3:], weights)


@pytest.mark.parametrize(
    "rows, keys, said",
    [
        (LONG, SHORT, {"causal": True}),
        (SHORT, LONG, {"causal": True}),
        (LONG, LONG, {"causal": True}),
        (1, LONG, {}),
        (SHORT, 1, {}),
        (SHORT, LONG, {"mask": torch.tensor([0])}),
        (SHORT, LONG, {"mask": torch.tensor([33])}),
        (SHORT, LONG, {"mask": KEYS}),
        (SHORT, LONG, {"mask": torch.where(KEYS, 0.3, -10000.0)[:, None, None], "causal": True}),
    ],
)
def test_masks_and_lengths(rows, keys, said):
    some = tensors(rows, keys, 32, 1, batch=1, sets=2, dtype=torch.float32)
    agree(some[:3], some[3:], **said)


def test_grouped_queries_batches_and_masks_of_each_head():
    some = tensors(SHORT, SHORT, 16, 2, groups=2, batch=2, sets=2, dtype=torch.float32)
    mask = torch.rand(2, 2, 1, SHORT, generator=torch.Generator().manual_seed(0)) < 0.6
    agree(some[:3], some[3:], mask=mask)


def test_any_strides():
    some = tensors(SHORT, SHORT, 32, 2, batch=1, sets=2, dtype=torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in some[:2]]
    last = some[2].mT.contiguous().mT  # not even unit last stride
    agree((*turned, last), (some[3].mT.contiguous().mT, *some[4:]))


@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_missing_tangent_is_left_out(given):
    q, k, v, *moved = tensors(SHORT, LONG, 32, 1, batch=1, sets=2, dtype=torch.float32)
    some = [t if there else None for t, there in zip(moved, given)]
    full = [t if there else torch.zeros_like(t) for t, there in zip(moved, given)]
    form, go, gt = Form(0.2), torch.ones_like(q), q.cos()
    found, right = (launch.OPS.pair(q, k, v, *t, None, form) for t in (some, full))
    grads = [launch.OPS.pair_backward(go, gt, q, k, v, *t, None, *x, form) for t, x in ((some, found), (full, right))]
    for a, b in [*zip(found, right), *((a, b) for a, b in zip(*grads) if a is not None)]:
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert [g is not None for g in grads[0][3:]] == list(given)


def test_the_plain_kernel_gives_the_same_bits_as_the_one_with_a_tangent_and_gradients_repeat():
    q, k, v, *moved = tensors(SHORT, LONG, 32, 1, batch=1, sets=2, dtype=torch.bfloat16)
    form = Form(0.2)
    o, to, lse, r = launch.OPS.pair(q, k, v, *moved, None, form)
    plain = launch.OPS.forward(q, k, v, None, form)
    assert torch.equal(plain[0], o) and torch.equal(plain[1], lse)
    twice = [launch.OPS.pair_backward(o, to, q, k, v, *moved, None, o, to, lse, r, form) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice))


def uncentred(*some: Tensor) -> Tensor:
    """The tangent whose p ds is rounded to bfloat16 as it is, the mean being subtracted at the end."""
    q, k, v, tq, tk, tv = (x.float() for x in some)
    p = torch.softmax(0.125 * q @ k.mT, -1)
    moved = p * 0.125 * (tq @ k.mT + q @ tk.mT)
    return moved.bfloat16().float() @ v + p.bfloat16().float() @ tv - moved.sum(-1, keepdim=True) * (p @ v)


@pytest.mark.parametrize("size", [0, 10, 100])
def test_what_all_keys_tangents_share_cancels_before_rounding(size):
    """Section 2.2 of the specification: with tk = randn + size * one vector the error stays at that of size 0."""
    q, k, v, tq, tk, tv = tensors(32, 64, 64, 1, batch=1, sets=2, dtype=torch.bfloat16)
    common = torch.randn(64, generator=torch.Generator().manual_seed(5))
    tk = (tk + size * common).bfloat16()
    wide = [x.double() for x in (q, k, v, tq, tk, tv)]
    right = torch.func.jvp(exact, tuple(wide[:3]), tuple(wide[3:]))[1]
    found = launch.OPS.pair(q, k, v, tq, tk, tv, None, Form(0.125))[1]
    assert relative(found, right) < 4e-3
    assert size < 100 or relative(uncentred(q, k, v, tq, tk, tv), right) > 10 * relative(found, right)
