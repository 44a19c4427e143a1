"""The chunked back end: equal to the reference, independent of chunks and micro-batches, and small."""

from __future__ import annotations

import math

import pytest
import torch
from fewstep_kernels.distillation import Head, TopK, distillation_loss
from fewstep_kernels.distillation.chunked import rows_per_chunk
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode

from .cases import KINDS, PAIRS, TOKENS, WORDS, student, teacher, teachers, value_and_gradients, worst

MASK = torch.tensor([True, True, False, True, False, True, True])


def chunked(head, given, **said):
    return value_and_gradients(head, given, backend="chunked", **said)


def reference(head, given, **said):
    return value_and_gradients(head, given, backend="reference", **said)


def detached(head: Head, dtype: torch.dtype | None = None) -> Head:
    """Leaves of their own with the same numbers."""
    parts = (head.hidden, head.weight, head.bias)
    return Head(*(x.detach().to(dtype or x.dtype).requires_grad_() for x in parts))


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_gradcheck(kind, form):
    head, given = student(4, 5, 2), teachers(tokens=4, words=5, temperature=1.5)[form]
    said = {
        "divergence": kind,
        "beta": 0.3,
        "temperature": 1.5,
        "mask": MASK[:4],
        "total": 5,
        "backend": "chunked",
        "chunk": 3,
    }
    assert gradcheck(
        lambda *parts: distillation_loss(Head(*parts), given, **said), (head.hidden, head.weight, head.bias)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("chunk", [1, 3, TOKENS])
@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_equals_the_reference_whatever_the_chunk(kind, form, chunk, temperature):
    given = teachers(temperature=temperature)[form]
    said = {"divergence": kind, "beta": 0.1, "temperature": temperature, "mask": MASK, "total": 9}
    assert worst(chunked(student(), given, chunk=chunk, **said), reference(student(), given, **said)) < 1e-13


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_equals_the_reference_to_1e_6_in_float32(kind, form):
    sizes = {"tokens": 24, "words": 300, "width": 16}
    given, exact = teachers(**sizes, dtype=torch.float32)[form], teachers(**sizes)[form]
    said = {"divergence": kind, "temperature": 2.0, "chunk": 7}
    found, plain = (f(student(**sizes, dtype=torch.float32), given, **said) for f in (chunked, reference))
    assert worst(found, plain) < 1e-6
    right = reference(student(**sizes), exact, **said)
    assert worst(found, right) < max(1e-6, 2 * worst(plain, right))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_errs_no_more_than_twice_as_much_as_plain_torch(kind, dtype):
    sizes = {"tokens": 40, "words": 200, "width": 16}
    head, given = student(**sizes, dtype=dtype), teacher(**sizes, dtype=dtype)
    exact = reference(
        detached(head, torch.float64), Head(given.hidden.double(), given.weight.double()), divergence=kind
    )
    found, plain = (f(head, given, divergence=kind, chunk=7) for f in (chunked, reference))
    assert found[0].dtype == torch.float32 and all(g.dtype == dtype for g in found[1:])
    for mine, other, right in zip(found, plain, exact, strict=True):
        assert worst((mine,), (right,)) < 2 * worst((other,), (right,)) + 1e-6
    assert worst(found[2:3], plain[2:3]) < (1e-3 if dtype == torch.float16 else 5e-3)
    assert worst(found[1:], exact[1:]) < (2e-3 if dtype == torch.float16 else 1.5e-2)


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_micro_batches_under_one_total_add_up_to_the_batch(kind, form):
    given = teachers()[form]
    whole = chunked(student(), given, divergence=kind, mask=MASK, total=MASK.sum())
    head, loss = student(), 0.0
    for part in (slice(0, 2), slice(2, 3), slice(3, TOKENS)):
        piece = Head(head.hidden[part], head.weight, head.bias)
        loss = loss + distillation_loss(
            piece, cut(given, part), divergence=kind, mask=MASK[part], total=MASK.sum(), backend="chunked"
        )
    parts = (loss.detach(), *torch.autograd.grad(loss, (head.hidden, head.weight, head.bias)))
    assert worst(parts, whole) < 1e-13


def cut(given, part):
    if isinstance(given, Head):
        return Head(given.hidden[part], given.weight)
    return TopK(given.ids[part], given.log_probs[part], given.rest) if isinstance(given, TopK) else given[part]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_what_masked_tokens_hold_never_enters(kind, form, backend):
    head, given = student(), teachers()[form]
    right = value_and_gradients(head, given, divergence=kind, mask=MASK, backend=backend)
    spoiled = detached(head)
    with torch.no_grad():
        spoiled.hidden[~MASK] = math.nan
    found = value_and_gradients(spoiled, spoil(given), divergence=kind, mask=MASK, backend=backend, chunk=2)
    assert worst(found, right) < 1e-13
    assert torch.equal(found[1][~MASK], torch.zeros(2, 4, dtype=torch.float64))


def spoil(given):
    """NaN, and ids of no word, in what is masked."""
    if isinstance(given, Head):
        return Head(given.hidden.masked_fill(~MASK[:, None], math.nan), given.weight)
    if isinstance(given, TopK):
        bad = ~MASK[:, None]
        return TopK(given.ids.masked_fill(bad, -100), given.log_probs.masked_fill(bad, math.nan), given.rest)
    return given.masked_fill(~MASK[:, None], math.nan)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("total", [None, 0])
def test_a_batch_that_is_all_masked_or_empty_gives_zero(backend, total):
    nothing = torch.zeros(TOKENS, dtype=torch.bool)
    found = value_and_gradients(student(), teacher(), mask=nothing, total=total, backend=backend)
    empty = value_and_gradients(student(0), teacher(0), total=total, backend=backend)
    assert all(not x.any() for x in (*found, *empty))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_words_masked_by_minus_infinity_count_nothing(kind, backend):
    away = torch.tensor([2, 5])
    stay = torch.tensor([w for w in range(WORDS) if w not in away])
    head, y = student(), teacher().logits()
    short = Head(head.hidden, head.weight[stay], head.bias[stay])
    masked = Head(head.hidden, head.weight, head.bias.index_fill(0, away, -math.inf))
    found, right = (
        distillation_loss(h, t, divergence=kind, backend=backend)
        for h, t in ((masked, y.index_fill(1, away, -math.inf)), (short, y[:, stay]))
    )
    assert torch.allclose(found, right)
    gradients = [torch.autograd.grad(x, (head.hidden, head.weight)) for x in (found, right)]
    assert worst(*gradients) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    hidden = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    head = Head(hidden, torch.eye(3, requires_grad=True), torch.zeros(3, requires_grad=True))
    found = chunked(head, -hidden.detach(), divergence=kind)
    assert all(torch.isfinite(x).all() for x in found)
    assert worst(found[:1], reference(head, -hidden.detach(), divergence=kind)[:1]) < 1e-6


def test_common_offsets_of_large_logits_lose_no_digits():
    head, given = student(dtype=torch.float32), teacher().logits()
    shifted = Head(head.hidden, head.weight, head.bias + 1024)
    quantised = (given.float() + 1024).double() - 1024  # what float32 keeps of them up there
    z = (head.logits() + 1024).double() - 1024
    right = distillation_loss(Head(z, torch.eye(WORDS, dtype=torch.float64)), quantised)
    found = distillation_loss(shifted, given.float() + 1024, backend="chunked")
    assert found.item() == pytest.approx(
        right.item(), rel=2e-4
    )  # the sum hidden . weight + 1024 rounds in its own order


@pytest.mark.parametrize("form", ["head", "logits", "tail"])
def test_no_tensor_as_large_as_all_logits_is_made(form):
    tokens, words, chunk = 96, 500, 8
    head, given = student(tokens, words), teachers(tokens=tokens, words=words)[form]

    class Largest(TorchFunctionMode):
        made = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                    self.made = max(self.made, x.numel())
            return out

    known = {given.untyped_storage().data_ptr()} if form == "logits" else set()
    with Largest() as largest:
        distillation_loss(head, given, backend="chunked", chunk=chunk, mask=torch.rand(tokens) > 0.3).backward()
    assert largest.made == chunk * words < tokens * words / 10


def test_only_parts_that_want_a_gradient_get_one():
    head, right = student(), reference(student(), teacher())
    for wanted in range(3):
        parts = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((head.hidden, head.weight, head.bias))]
        distillation_loss(Head(*parts), teacher(), backend="chunked").backward()
        assert [x.grad is not None for x in parts] == [i == wanted for i in range(3)]
        assert torch.allclose(parts[wanted].grad, right[1 + wanted])


def test_without_a_graph_the_value_alone_is_found():
    head = student()
    with torch.no_grad():
        loss = distillation_loss(head, teacher(), backend="chunked")
    assert not loss.requires_grad
    assert torch.allclose(loss, distillation_loss(head, teacher(), backend="reference"))


def test_the_graph_can_be_run_back_twice_and_scaled():
    head = student()
    loss = distillation_loss(head, teacher(), backend="chunked")
    first, second = (torch.autograd.grad(factor * loss, head.hidden, retain_graph=True)[0] for factor in (1, -3))
    assert torch.allclose(second, -3 * first)


def test_gradients_of_gradients_are_refused_with_the_back_end_that_has_them():
    head = student()
    loss = distillation_loss(head, teacher(), backend="chunked")
    with pytest.raises(RuntimeError, match="write backend='reference'"):
        torch.autograd.grad(loss, head.hidden, create_graph=True)


def test_leading_dimensions_and_strides_are_free():
    flat = chunked(student(6), teacher(6).logits(), mask=MASK[:6], chunk=4)
    head = student(6)
    hidden = head.hidden.detach().T.contiguous().T.reshape(2, 3, 4).requires_grad_()
    weight = head.weight.detach().T.contiguous().T.requires_grad_()
    logits = teacher(6).logits().T.contiguous().T.reshape(2, 3, WORDS)
    found = chunked(Head(hidden, weight, head.bias), logits, mask=MASK[:6].reshape(2, 3), chunk=4)
    assert found[1].shape == (2, 3, 4)
    assert worst((found[0], found[1].reshape(6, 4), *found[2:]), flat) < 1e-13


def test_the_teachers_tensors_are_left_as_they_were():
    for form, given in teachers().items():
        before = (
            [x.clone() for x in vars(given).values() if isinstance(x, torch.Tensor)]
            if form != "logits"
            else [given.clone()]
        )
        chunked(student(), given, divergence="jsd" if form != "drop" else "reverse_kl")
        after = [x for x in vars(given).values() if isinstance(x, torch.Tensor)] if form != "logits" else [given]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), form


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_the_parameters(backend):
    head, given = student(dtype=torch.float32), teacher(dtype=torch.float32)
    half = detached(head, torch.bfloat16), Head(given.hidden.bfloat16(), given.weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(head, given, backend=backend)
    assert found[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in found[1:])
    assert worst(found, value_and_gradients(*half, backend=backend)) < 1e-6


def test_chunks_are_a_power_of_two_near_n_d_over_v_within_bounds():
    assert rows_per_chunk(8192, 151_936, 2048) == 128
    assert rows_per_chunk(8192, 151_936, 2048, on_gpu=True) == 256
    assert rows_per_chunk(32_768, 32_000, 1024) == 1024
    assert rows_per_chunk(10**6, 32_000, 4096, on_gpu=True) == 4096
    assert rows_per_chunk(0, 32_000, 1024) == 128


def test_a_top_k_sums_a_small_tail_from_its_own_words():
    """1 - sum q would be rounding alone here: q outside is 1e-9."""
    hidden = torch.tensor([[20.0, 20.0, 0.0, 0.0]], requires_grad=True)
    head = Head(hidden, torch.eye(4, requires_grad=True), torch.zeros(4, requires_grad=True))
    stored = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]).log())
    exact = [x.detach().double().requires_grad_() for x in (head.hidden, head.weight, head.bias)]
    right = reference(Head(*exact), TopK(stored.ids, stored.log_probs.double()))
    assert worst(chunked(head, stored), right) < 1e-6
