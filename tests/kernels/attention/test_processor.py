"""Attention inside of diffusers' networks: derivatives, gradients, checkpointing, and what stays with torch."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from fewstep_kernels.attention import attending, backends, use_attention
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.maths.derivative import derivative

from .cases import relative, tensors
from .networks import BUILT, made

AT = torch.tensor([0.3, 0.7])


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Which back ends ran, in order."""
    seen: list[str] = []
    for name, backend in backends.BACKENDS.items():

        def run(call, name=name, backend=backend):
            seen.append(name)
            return backend.run(call)

        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(backend.refuses, run))
    return seen


@pytest.mark.parametrize("name", BUILT)
def test_the_derivative_of_each_network_is_that_of_torchs_formula(name, runs):
    """Without a word from the user `derivative` runs on `chunked`; a processor's own back end goes before."""
    module, answer = made(name)
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        right = forward_ad.unpack_dual(answer(forward_ad.make_dual(AT, torch.ones_like(AT))))
    for backend in ("chunked", "reference", "sdpa_math"):
        if backend != "chunked":
            use_attention(module, backend)
        runs.clear()
        value, slope = derivative(answer, AT)
        assert set(runs) == {backend}
        assert slope.norm() > 1e-2 and relative(value, right.primal) < 1e-5 and relative(slope, right.tangent) < 1e-5


@pytest.mark.parametrize("name", BUILT)
def test_gradients_through_a_processor_are_torchs_with_and_without_checkpointing(name, runs):
    module, answer = made(name)

    def gradients():
        module.zero_grad()
        answer(AT).square().mean().backward()
        return torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])

    right = gradients()
    assert not runs
    use_attention(module, "chunked")
    assert relative(gradients(), right) < 1e-5 and set(runs) == {"chunked"}
    once = len(runs)
    module.enable_gradient_checkpointing()
    assert relative(gradients(), right) < 1e-5
    assert len(runs) > 2 * once and set(runs) == {"chunked"}  # the second run of a block is routed too


def test_processors_keep_their_names_signatures_and_copies():
    module, _ = made("unet")
    before = {n: (type(p).__name__, inspect.signature(p.__call__)) for n, p in module.attn_processors.items()}
    use_attention(module, "chunked")
    use_attention(module, "reference")
    after = {n: (type(p).__name__, inspect.signature(p.__call__)) for n, p in module.attn_processors.items()}
    assert after == before
    assert {p.fewstep_backend for p in copy.deepcopy(module).attn_processors.values()} == {"reference"}
    use_attention(module, None)
    module.set_default_attn_processor()
    assert not any(hasattr(p, "fewstep_backend") for p in module.attn_processors.values())


def test_a_network_without_processors_is_told_of_the_context():
    with pytest.raises(ValueError, match=r"Linear has no attention processors.*attending\('chunked'\)"):
        use_attention(torch.nn.Linear(2, 2), "chunked")


@pytest.mark.parametrize(
    "said, named",
    [
        ({"dropout_p": 0.5}, "dropout"),
        ({"is_causal": True}, "aligns the first"),
        ({"attn_mask": torch.zeros(7, 9, requires_grad=True)}, "a mask with a gradient"),
    ],
)
def test_what_attention_has_not_stays_with_torch_and_is_refused_by_name(said, named):
    q, k, v = tensors(dtype=torch.float32)
    torch.manual_seed(0)
    right = F.scaled_dot_product_attention(q, k, v, **said)
    torch.manual_seed(0)
    with attending():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **said), right, rtol=0, atol=0)
    with attending("chunked"), pytest.raises(ValueError, match=f"{named}.*write auto"):
        F.scaled_dot_product_attention(q, k, v, **said)


def test_three_dimensions_stay_with_torch_and_masks_of_two_are_rows_by_keys():
    q, k, v = (x[:, 0] for x in tensors(dtype=torch.float32))
    mask = torch.arange(9)[None] <= torch.arange(7)[:, None]
    with attending():
        assert F.scaled_dot_product_attention(q, k, v).shape == q.shape
    q, k, v = (x[:, None] for x in (q, k, v))
    with attending("reference"):
        found = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, mask))


def test_grouped_queries_of_torch_are_grouped_queries():
    q, k, v = tensors(heads=4, groups=2)
    with attending("reference"):
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
