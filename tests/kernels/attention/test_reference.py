"""The reference and its blocks against the formula and float64 differences: output, tangent, and all gradients of both."""

from __future__ import annotations

import pytest
import torch
from fewstep_kernels.attention import attention, backends, chunked
from fewstep_kernels.attention.form import Form
from torch.autograd import gradcheck, gradgradcheck

from .cases import F64, MASKS, both, exact, relative, tensors

OURS = ("reference", "chunked")
WEIGHTS = {"primal": (1.0, 0.0), "tangent": (0.0, 1.0), "both": (1.0, 1.0)}


@pytest.fixture(autouse=True)
def blocks_of_three(monkeypatch):
    """Small blocks, the last one not full."""
    monkeypatch.setattr(backends, "CHUNKED", chunked.ops(lambda q, k: 3))
    monkeypatch.setitem(
        backends.BACKENDS,
        "chunked",
        backends.Backend(backends._mask_refused, lambda c: backends._run(backends.CHUNKED, False, c)),
    )


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("loss", WEIGHTS)
def test_output_tangent_and_six_gradients_are_those_of_the_formula(backend, kind, loss):
    q, k, v, *moved = tensors(sets=2)
    said = MASKS[kind]
    found = both(lambda *x: attention(*x, backend=backend, **said), (q, k, v), tuple(moved), WEIGHTS[loss])
    right = both(lambda *x: exact(*x, **said), (q, k, v), tuple(moved), WEIGHTS[loss])
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", ["causal", "lengths", "added rows, causal"])
def test_forward_and_reverse_mode_pass_gradcheck(backend, kind):
    inputs = tuple(x.requires_grad_() for x in tensors(dim=5, heads=2, groups=2, batch=2))
    assert gradcheck(
        lambda *x: attention(*x, backend=backend, **MASKS[kind]), inputs, check_forward_ad=True, fast_mode=True
    )


@pytest.mark.parametrize("kind", ["none", "causal"])
def test_the_gradient_has_a_gradient_and_a_forward_mode(kind):
    inputs = tuple(x.requires_grad_() for x in tensors(5, 6, dim=5, batch=1))
    said = {} if kind == "none" else {"causal": True}
    assert gradgradcheck(
        lambda *x: attention(*x, backend="chunked", **said), inputs, check_fwd_over_rev=True, fast_mode=True
    )


@pytest.mark.parametrize(
    "given", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("backend", OURS)
def test_a_tangent_that_is_not_there_is_zero(backend, given):
    """Cross-attention to a text: keys and values do not move with the time."""
    primals, moved = tensors(sets=2)[:3], tensors(sets=2)[3:]
    zero = [t if there else torch.zeros_like(t) for t, there in zip(moved, given)]
    right = both(exact, primals, tuple(zero), (1.0, 1.0))
    leaves = tuple(x.requires_grad_() for x in primals)
    turned = tuple(t.detach().requires_grad_() for t in moved)

    def f(*some):
        parts = iter(some)
        return attention(*(next(parts) if there else x for x, there in zip(leaves, given)), backend=backend)

    chosen = [i for i in range(3) if given[i]]
    o, to = torch.func.jvp(f, tuple(leaves[i] for i in chosen), tuple(turned[i] for i in chosen))
    wanted = [*leaves, *(turned[i] for i in chosen)]
    grads = torch.autograd.grad((o * o.detach().cos()).sum() + (to * to.detach().cos()).sum(), wanted)
    for a, b in zip((o, to, *grads), [*right[:5], *(right[5 + i] for i in chosen)], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows, keys", [(1, 9), (9, 1), (1, 1), (12, 5), (5, 12)])
def test_lengths_of_one_and_more_queries_than_keys(rows, keys, causal):
    """With causal and N > M the first N - M queries see nothing and give 0."""
    q, k, v, *moved = tensors(rows, keys, heads=4, groups=2, sets=2)
    found = both(lambda *x: attention(*x, causal=causal, backend="chunked"), (q, k, v), tuple(moved), (1.0, 1.0))
    right = both(lambda *x: exact(*x, causal=causal), (q, k, v), tuple(moved), (1.0, 1.0))
    assert all((a - b).abs().max() < 1e-13 for a, b in zip(found, right, strict=True))
    blind = max(0, rows - keys) if causal else 0
    assert not found[0][:, :, :blind].any() and not found[1][:, :, :blind].any()


@pytest.mark.parametrize("backend", [*OURS, "sdpa", "sdpa_math"])
def test_no_key_to_see_gives_zero_and_zero_gradients(backend):
    for keys, mask in ((0, None), (4, torch.zeros(2, dtype=torch.int64)), (4, torch.zeros(2, 4, dtype=torch.bool))):
        q, k, v = (x.requires_grad_() for x in tensors(3, keys))
        o = attention(q, k, v, mask, backend=backend)
        o.sum().backward()
        assert o.shape == (2, 2, 3, 8) and not o.any()
        assert not any(x.grad.any() for x in (q, k, v))


# invariants


def ops_pair(*x, mask=None, form=None):
    return backends.CHUNKED.pair(*x, mask, form or Form(8**-0.5))


def test_shifting_all_tangents_of_keys_by_one_vector_changes_nothing():
    q, k, v, tq, tk, tv = tensors(sets=2)
    shifted = ops_pair(q, k, v, tq, tk + torch.linspace(-50, 50, 8, dtype=F64), tv)[1]
    torch.testing.assert_close(shifted, ops_pair(q, k, v, tq, tk, tv)[1], rtol=0, atol=1e-12)


def test_equal_values_leave_the_tangent_of_the_values_alone():
    q, k, _, tq, tk, tv = tensors(sets=2)
    v = torch.ones_like(k) * torch.arange(8, dtype=F64)
    o, to, lse, _ = ops_pair(q, k, v, tq, tk, tv)
    p = (torch.einsum("bhnd,bhmd->bhnm", q, k) * 8**-0.5 - lse[..., None]).exp()
    torch.testing.assert_close(to, p @ tv, rtol=0, atol=1e-13)
    torch.testing.assert_close(o, v[:, :, :1].expand_as(o), rtol=0, atol=1e-13)


def test_the_tangent_is_linear_in_the_tangents():
    primals, first, second = (tensors(sets=3)[i : i + 3] for i in (0, 3, 6))
    mixed = tuple(2 * a - 3 * b for a, b in zip(first, second))
    found = 2 * ops_pair(*primals, *first)[1] - 3 * ops_pair(*primals, *second)[1]
    torch.testing.assert_close(ops_pair(*primals, *mixed)[1], found, rtol=0, atol=1e-13)


def test_the_tangent_is_the_limit_of_differences():
    primals, moved = tensors(sets=2)[:3], tensors(sets=2)[3:]
    h = 1e-5
    ends = [exact(*(x + s * h * t for x, t in zip(primals, moved)), causal=True) for s in (1, -1)]
    found = ops_pair(*primals, *moved, form=Form(8**-0.5, True, 2))[1]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
def test_half_precision_costs_the_rounding_of_inputs_and_outputs_alone(dtype, bound):
    """And so less than twice what torch's own formula loses in that precision."""
    primals, moved = tensors(33, 70, 32, sets=2, dtype=dtype)[:3], tensors(33, 70, 32, sets=2, dtype=dtype)[3:]
    right = both(exact, tuple(x.double() for x in primals), tuple(x.double() for x in moved), (1.0, 1.0))
    ours = both(lambda *x: attention(*x, backend="chunked"), primals, moved, (1.0, 1.0))
    theirs = both(lambda *x: attention(*x, backend="sdpa_math"), primals, moved, (1.0, 1.0))
    for i, (a, b, c) in enumerate(zip(ours, theirs, right, strict=True)):
        assert a.dtype == dtype and relative(a, c) < bound * (1 if i < 2 else 2.5)
        assert relative(a, c) < 2 * relative(b, c)


def test_no_block_is_larger_than_asked_for_and_none_is_smaller_than_sixteen_rows():
    def rows(batch, keys):
        return chunked.bounded(
            torch.empty(batch, 2, 10**4, 8, device="meta"), torch.empty(batch, 2, keys, 8, device="meta")
        )

    assert rows(1, 100) == 256 and rows(1, 2**14) == 64 and rows(64, 2**20) == 16


def test_extreme_scores_stay_finite():
    q, k, v, *moved = tensors(sets=2, dtype=torch.float32)
    found = both(lambda *x: attention(*x, backend="chunked"), (1e3 * q, k, v), tuple(moved), (1.0, 1.0))
    assert all(x.isfinite().all() for x in found)
