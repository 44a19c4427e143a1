"""Every transform of torch that attention may stand in, against torch's own formula (SDPBackend.MATH)."""

from __future__ import annotations

import pytest
import torch
from fewstep_kernels.attention import attention
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vjp, vmap

from .cases import F64, exact, relative, tensors

BACKENDS = ("reference", "chunked")
each = pytest.mark.parametrize("backend", BACKENDS)


def f(backend: str):
    return lambda *x: attention(*x, backend=backend, causal=True)


def right(*x: Tensor) -> Tensor:
    return exact(*x, causal=True)


def close(found, expected, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@each
def test_jvp_without_a_graph(backend):
    q, k, v, *moved = tensors(sets=2)
    with torch.no_grad():
        found = jvp(f(backend), (q, k, v), tuple(moved))
    close(found, jvp(right, (q, k, v), tuple(moved)))
    assert not found[0].requires_grad and not found[1].requires_grad


@each
def test_dual_level_and_one_that_ends(backend):
    q, k, v, *moved = tensors(sets=2)
    with forward_ad.dual_level():
        out = f(backend)(*(forward_ad.make_dual(x, t) for x, t in zip((q, k, v), moved)))
        o, to = forward_ad.unpack_dual(out)
    close((o, to), jvp(right, (q, k, v), tuple(moved)))
    assert forward_ad.unpack_dual(f(backend)(q, k, v)).tangent is None


@each
def test_linearize_gives_the_tangent_of_each_direction(backend):
    q, k, v, *moved = tensors(sets=3)
    out, along = linearize(f(backend), q, k, v)
    close(out, right(q, k, v))
    for t in (moved[:3], moved[3:]):
        close(along(*t), jvp(right, (q, k, v), tuple(t))[1])


@each
def test_func_grad_vjp_and_jacobians(backend):
    q, k, v = tensors(3, 4, 2, batch=1)

    def loss(g):
        return lambda *x: (g(*x) ** 2).sum()

    close(grad(loss(f(backend)), (0, 1, 2))(q, k, v), grad(loss(right), (0, 1, 2))(q, k, v))
    close(vjp(f(backend), q, k, v)[1](torch.ones_like(q)), vjp(right, q, k, v)[1](torch.ones_like(q)))
    for jacobian in (jacfwd, jacrev):
        close(jacobian(f(backend), (0, 1, 2))(q, k, v), jacobian(right, (0, 1, 2))(q, k, v))


@each
def test_hessian_vector_products_forward_over_reverse_and_reverse_over_reverse(backend):
    q, k, v, *moved = tensors(sets=2)

    def gradient(g):
        return grad(lambda *x: (g(*x) ** 3).sum(), (0, 1, 2))

    expected = jvp(gradient(right), (q, k, v), tuple(moved))[1]
    close(jvp(gradient(f(backend)), (q, k, v), tuple(moved))[1], expected)
    close(vjp(gradient(f(backend)), q, k, v)[1](tuple(moved)), expected)


@each
def test_gradient_of_a_jvp_inside_functions(backend):
    """Reverse over forward, as func.grad of a loss that holds a jvp."""
    q, k, v, *moved = tensors(sets=2)

    def loss(g):
        def of(q, k, v, *t):
            o, to = jvp(g, (q, k, v), t)
            return (o * to).sum()

        return grad(of, tuple(range(6)))(q, k, v, *moved)

    close(loss(f(backend)), loss(right))


@each
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 2), (3, None, 0)])
def test_vmap_over_inputs(backend, in_dims):
    q, k, v = tensors()
    inputs = [x if d is None else torch.stack([x, 2 * x, -x], d) for x, d in zip((q, k, v), in_dims)]
    close(vmap(f(backend), in_dims)(*inputs), vmap(right, in_dims)(*inputs))
    mapped = vmap(grad(lambda *x: (f(backend)(*x) ** 2).sum(), (0, 1, 2)), in_dims)(*inputs)
    close(mapped, vmap(grad(lambda *x: (right(*x) ** 2).sum(), (0, 1, 2)), in_dims)(*inputs))


@each
def test_vmap_over_tangents_and_over_masks(backend):
    q, k, v, *moved = tensors(sets=2)
    many = tuple(torch.stack([t, 2 * t, -t]) for t in moved)

    def along(g):
        return vmap(lambda *t: jvp(g, (q, k, v), t)[1])(*many)

    close(along(f(backend)), along(right))
    masks = torch.rand(4, 2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    close(
        vmap(lambda m: attention(q, k, v, m, backend=backend))(masks), torch.stack([exact(q, k, v, m) for m in masks])
    )
    whole = masks[:1, :1, None, None].expand(1, 1, 1, 1, 9).squeeze(0)  # one mask for the whole batch
    found = vmap(lambda x: attention(x, k, v, whole, backend=backend))(torch.stack([q, -q]))
    close(found, torch.stack([exact(x, k, v, whole) for x in (q, -q)]))


@each
def test_a_jvp_of_a_jvp_names_the_back_end_that_has_it(backend):
    q, k, v, *t = tensors(sets=2)

    def twice(g):
        return jvp(lambda *x: jvp(g, x, tuple(t))[1], (q, k, v), tuple(t))[1]

    with pytest.raises(NotImplementedError, match="sdpa_math"):
        twice(f(backend))
    close(twice(f("sdpa_math")), twice(right))


def test_the_functions_rule_serves_where_the_entry_is_skipped():
    """A tangent that only `Attend` sees, as from a saved graph."""
    from fewstep_kernels.attention.backends import CHUNKED
    from fewstep_kernels.attention.form import Form
    from fewstep_kernels.attention.function import Attend

    q, k, v, *t = tensors(sets=2)
    found = jvp(lambda *x: Attend.apply(*x, None, Form(8**-0.5), CHUNKED)[0], (q, k, v), tuple(t))
    close(found, jvp(exact, (q, k, v), tuple(t)))


# precision and autocast


class Block(nn.Module):
    """A projection in front and one behind, in any dtype."""

    def __init__(self, dtype: torch.dtype, backend: str):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.backend = nn.Linear(32, 96, dtype=dtype), nn.Linear(32, 32, dtype=dtype), backend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.out(attention(q, k, v, backend=self.backend).transpose(1, 2).flatten(2))


def step(block: Block, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
    x, t = (torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(i), dtype=F64).to(dtype) for i in (0, 1))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        o, to = jvp(block, (x,), (t,))
    (o.double().square().sum() + to.double().square().sum()).backward()
    return [o, to, x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize(
    "dtype, autocast, bound",
    [(torch.float32, False, 2e-6), (torch.bfloat16, False, 2e-2), (torch.float32, True, 2e-2)],
)
@each
def test_models_in_float32_bfloat16_and_autocast(backend, dtype, autocast, bound):
    """Gradients of parameters and input through primal and tangent, beside a float64 model that shares the weights' values."""
    exact_block = Block(F64, "sdpa_math")
    exact_block.load_state_dict({k: v.double() for k, v in Block(dtype, backend).state_dict().items()})
    expected = step(exact_block, F64, False)
    found = step(Block(dtype, backend), dtype, autocast)
    assert found[0].dtype == found[1].dtype == (torch.bfloat16 if autocast else dtype)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < bound


def test_under_autocast_float64_stays_as_it_is():
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*tensors(), backend="chunked").dtype == F64
        assert attention(*tensors(dtype=torch.float32), backend="chunked").dtype == torch.bfloat16
