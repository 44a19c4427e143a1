"""The Triton kernels in the interpreter, against the reference: run by test_triton.py in a process of its own.

The interpreter has to be asked for before anything imports triton, so this is no test file of the suite's process.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from fewstep_kernels.distillation import Head, TopK, backends, distillation_loss

from .cases import KINDS, PAIRS, student, teacher, teachers, value_and_gradients, worst

LOADED = "triton" in sys.modules
from fewstep_kernels.distillation import rows  # noqa: E402

SIZES = {"tokens": 4, "words": 83, "width": 16}  # three tiles of 32 words, the last not full
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 32)


def triton(head, given, **said):
    return value_and_gradients(head, given, backend="triton", **said)


def reference(head, given, **said):
    return value_and_gradients(head, given, backend="reference", **said)


def test_the_entry_loads_no_triton():
    assert not LOADED


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_equals_the_reference_in_float32(kind, form):
    mask = torch.tensor([True, False, True, True])
    given = teachers(**SIZES, dtype=torch.float32, temperature=2.0)[form]
    said = {"divergence": kind, "beta": 0.3, "temperature": 2.0, "mask": mask, "total": 7}
    found = triton(student(**SIZES, dtype=torch.float32), given, chunk=3, **said)
    assert worst(found, reference(student(**SIZES, dtype=torch.float32), given, **said)) < 2e-6
    assert worst(found[:1], reference(student(**SIZES, dtype=torch.float32), given, **said)[:1]) < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kind", "form"), [*((kind, "head") for kind in KINDS), ("forward_kl", "tail")])
def test_half_precision_errs_no_more_than_twice_as_much_as_plain_torch(kind, form, dtype):
    sizes = SIZES | {"tokens": 6}
    head, given = student(**sizes, dtype=dtype), teachers(**sizes, dtype=dtype)[form]
    exact = student(**sizes, dtype=dtype)
    exact = Head(*(x.detach().double().requires_grad_() for x in (exact.hidden, exact.weight, exact.bias)))
    right = reference(exact, wide(given), divergence=kind)
    found, plain = (f(head, given, divergence=kind) for f in (triton, reference))
    for mine, other, true in zip(found, plain, right, strict=True):
        assert worst((mine,), (true,)) < 2 * worst((other,), (true,)) + 1e-6
    assert worst(found[2:3], plain[2:3]) < (1e-3 if dtype == torch.float16 else 5e-3)


def wide(given):
    return Head(given.hidden.double(), given.weight.double()) if isinstance(given, Head) else given


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_probe_of_auto_finds_agreement_within_its_bounds(dtype, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 4096)
    assert backends.disagreement(rows.TRITON, torch.device("cpu"), dtype) < backends.TRITON_ERROR[dtype] / 4


@pytest.mark.parametrize("kind", KINDS)
def test_words_masked_by_minus_infinity_count_nothing(kind):
    """A whole tile of them, too."""
    away = torch.cat([torch.arange(32), torch.tensor([40, 82])])
    stay = torch.tensor([w for w in range(83) if w not in away])
    head, y = student(**SIZES, dtype=torch.float32), teacher(**SIZES, dtype=torch.float32).logits()
    masked = Head(head.hidden, head.weight, head.bias.index_fill(0, away, -math.inf))
    short = Head(head.hidden, head.weight[stay], head.bias[stay])
    found, right = (
        distillation_loss(h, t, divergence=kind, backend=backend)
        for h, t, backend in ((masked, y.index_fill(1, away, -math.inf), "triton"), (short, y[:, stay], "reference"))
    )
    gradients = [torch.autograd.grad(x, (head.hidden, head.weight)) for x in (found, right)]
    assert worst((found, *gradients[0]), (right, *gradients[1])) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    hidden = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    head = Head(hidden, torch.eye(3, requires_grad=True), torch.zeros(3, requires_grad=True))
    found = triton(head, -hidden.detach(), divergence=kind)
    assert all(torch.isfinite(x).all() for x in found)
    assert worst(found[:1], reference(head, -hidden.detach(), divergence=kind)[:1]) < 1e-6


def test_all_words_stored_leave_an_empty_tail():
    sizes = SIZES | {"words": 40}
    given = teacher(**sizes, dtype=torch.float32)
    log_probs, ids = given.logits().log_softmax(-1).topk(40)
    found = triton(student(**sizes, dtype=torch.float32), TopK(ids, log_probs))
    assert worst(found, reference(student(**sizes, dtype=torch.float32), given)) < 2e-6


def test_strides_are_free():
    head, y = student(**SIZES, dtype=torch.float32), teacher(**SIZES, dtype=torch.float32).logits()
    across = y.T.contiguous().T
    assert worst(triton(head, across), reference(head, y)) < 2e-6
