"""Which back end serves a call, what the others say, and that no input gives a wrong answer."""

from __future__ import annotations

import logging

import pytest
import torch
from fewstep_kernels.attention import attention, backends, launch
from torch.func import jvp

from .cases import KEYS, MASKS, exact, relative, tensors

CPU = torch.device("cpu")
SERVE_ANYWHERE = ("reference", "chunked", "sdpa", "sdpa_math")


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


@pytest.mark.parametrize("backend", SERVE_ANYWHERE)
@pytest.mark.parametrize("kind", MASKS)
def test_all_back_ends_mean_the_same_by_masks_causality_and_groups(backend, kind):
    q, k, v = tensors(heads=4, groups=2, dtype=torch.float32)
    found = attention(q, k, v, backend=backend, **MASKS[kind])
    torch.testing.assert_close(found, exact(q, k, v, **MASKS[kind]), rtol=0, atol=1e-6)


def test_causal_aligns_the_last_query_and_key_where_torch_aligns_the_first():
    q, k, v = tensors(3, 9)
    last = attention(q, k, v, causal=True)[:, :, -1]
    torch.testing.assert_close(last, attention(q[:, :, -1:], k, v)[:, :, 0])
    first = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 0]
    torch.testing.assert_close(first, v[:, :, 0])


def test_auto_is_torchs_own_without_a_tangent_and_chunked_with_one(runs):
    q, k, v, *t = tensors(sets=2)
    attention(q, k, v)
    jvp(attention, (q, k, v), tuple(t))
    learned = torch.zeros(7, KEYS, dtype=q.dtype)[None, None]
    jvp(lambda q, m: attention(q, k, v, m), (q, learned), (t[0], learned))
    assert runs == ["sdpa", "chunked", "sdpa_math"]


def test_the_derivative_of_a_mask_is_right_where_it_is_served():
    q, k, v, *t = tensors(sets=2)
    mask = torch.zeros(2, 2, 7, KEYS, dtype=q.dtype)
    moved = torch.sin(torch.arange(mask.numel(), dtype=q.dtype)).reshape(mask.shape)
    found = jvp(lambda *x: attention(*x), (q, k, v, mask), (*t, moved))
    torch.testing.assert_close(found, jvp(exact, (q, k, v, mask), (*t, moved)), rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match="'chunked' gives no gradient to a mask: write one of sdpa, sdpa_math, or auto"
    ):
        attention(q, k, v, mask.requires_grad_(), backend="chunked")


# what is refused, and what is named instead


def refusal(backend: str, *some, **said) -> str:
    with pytest.raises(ValueError) as caught:
        attention(*some, backend=backend, **said)
    return str(caught.value)


def test_sdpa_and_xformers_have_no_forward_mode_and_name_those_that_have():
    q, k, v, *t = tensors(sets=2)
    for backend in ("sdpa", "xformers"):
        with pytest.raises(ValueError, match=r"no forward mode.*write one of reference, chunked, sdpa_math, or auto"):
            jvp(lambda *x, name=backend: attention(*x, backend=name), (q, k, v), tuple(t))


def test_triton_says_what_it_lacks(monkeypatch):
    served = "write one of reference, chunked, sdpa, sdpa_math, or auto"
    single = tensors(dim=8, dtype=torch.float32)
    assert f"takes float32, float16 and bfloat16, not float64: {served}" in refusal("triton", *tensors())
    assert f"multiples of 8 up to 128, not 160: {served}" in refusal("triton", *tensors(dim=160, dtype=torch.float32))
    assert "multiples of 8 up to 128, not 20:" in refusal("triton", *tensors(dim=20, dtype=torch.float32))
    assert "differs from query to query" in refusal("triton", *single, mask=MASKS["rows"]["mask"])
    q, k, v = single
    assert "takes one head dim, and got 8 of q, k and 4 of v" in refusal("triton", q, k, v[..., :4])
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "needs the package triton (pip install triton)" in refusal("triton", *single)


@pytest.mark.skipif(launch.importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_on_a_cpu_asks_for_a_gpu_or_the_interpreter():
    assert "needs a CUDA device, not cpu, or TRITON_INTERPRET=1" in refusal("triton", *tensors(dtype=torch.float32))


def test_xformers_is_probed_by_a_call_and_takes_no_masks():
    assert "xformers' does not run here" in refusal("xformers", *tensors(dtype=torch.float32))
    assert "without masks" in refusal("xformers", *tensors(dtype=torch.float32), mask=torch.tensor([1, 2]))


def test_an_unknown_back_end_is_told_the_known_ones():
    assert "unknown attention backend 'flash': known: auto, triton, reference" in refusal("flash", *tensors())


@pytest.mark.parametrize(
    "change, said, named",
    [
        (lambda q, k, v: (q, k.float(), v), {}, "cast them to one floating-point dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), {}, "cast them to one floating-point dtype"),
        (lambda q, k, v: (q, k.to("meta"), v), {}, "k on meta.*move them to one"),
        (lambda q, k, v: (q[0], k[0], v[0]), {}, r"add or fold dimensions"),
        (lambda q, k, v: (q, k[:, :, :4], v), {}, "the same keys in v"),
        (lambda q, k, v: (q, k[..., :4], v), {}, "one head dim"),
        (lambda q, k, v: (q[:1], k, v), {}, "one batch size"),
        (lambda q, k, v: (q[:, :1], k, v), {}, "a multiple of those of k"),
        (lambda q, k, v: (q, k, v), {"mask": torch.zeros(7, KEYS)}, r"mask of shape \[7, 9\].*lengths \[B\]"),
        (lambda q, k, v: (q, k, v), {"mask": torch.ones(2, KEYS, dtype=torch.int64)}, "give integer lengths"),
        (lambda q, k, v: (q, k, v), {"mask": torch.ones(2, dtype=torch.bool)}, "give integer lengths"),
        (lambda q, k, v: (q, k, v), {"mask": torch.ones(2, dtype=torch.int64, device="meta")}, "move the mask"),
    ],
)
def test_bad_input_is_named_with_the_mend(change, said, named):
    for backend in ("auto", *SERVE_ANYWHERE):
        with pytest.raises(ValueError, match=named):
            attention(*change(*tensors()), backend=backend, **said)


@pytest.mark.parametrize("backend", SERVE_ANYWHERE)
def test_strides_and_a_head_dim_of_the_values_of_their_own_are_served(backend):
    q, k, v = tensors()
    turned = tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    torch.testing.assert_close(attention(*turned, backend=backend), exact(q, k, v))
    torch.testing.assert_close(attention(q, k, v[..., :3], backend=backend), exact(q, k, v)[..., :3])
    torch.testing.assert_close(attention(q[:, :, :0], k, v, backend=backend), q[:, :, :0])


# what `auto` trusts


def test_a_kernel_is_trusted_once_it_agrees_and_otherwise_the_log_says_why(monkeypatch, caplog):
    wrong = backends.CHUNKED._replace(pair=lambda *x: tuple(1.1 * y for y in backends.CHUNKED.pair(*x)))

    def broken(*_):
        raise RuntimeError("out of registers")

    for ops, good, said in (
        (backends.CHUNKED, True, "triton (triton differs from the reference by"),
        (wrong, False, "chunked (triton differs from the reference by 1.0e-01)"),
        (backends.CHUNKED._replace(pair_backward=broken), False, "chunked (triton failed: out of registers)"),
    ):
        monkeypatch.setattr(launch, "OPS", ops)
        backends.proven.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert backends.proven(CPU, torch.float32, 32) is good
            assert backends.proven(CPU, torch.float32, 32) is good
        assert [said in line for line in caplog.messages] == [True]
    backends.proven.cache_clear()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_blocks_agree_with_the_whole(dtype, bound):
    assert backends.disagreement(backends.CHUNKED, CPU, dtype, 72) < bound
    assert relative(backends.CHUNKED.forward(*tensors(), None, backends.Form(1.0))[0], exact(*tensors())) > 1e-3
