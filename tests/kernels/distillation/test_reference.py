"""The definition of the loss: known values, the divergences of `fewstep.maths`, and what a stored top k stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
from fewstep_kernels.distillation import Head, TopK, distillation_loss
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from fewstep.maths import divergences

from .cases import KINDS, PAIRS, TOKENS, WORDS, numbers, student, teacher, teachers, top_k

F64 = torch.float64
TWO = torch.tensor([[2.0, 0.0, 0.0]], dtype=F64)  # teacher's and student's logits of the known values
ONE = Head(torch.tensor([[1.0, 0.0, -1.0]], dtype=F64), torch.eye(3, dtype=F64))


def reference(head, given, **said):
    return distillation_loss(head, given, backend="reference", **said)


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ({}, 0.0615542),
        ({"divergence": "reverse_kl"}, 0.0766673),
        ({"divergence": "jsd", "beta": 0.1}, 0.00563181),
        ({"divergence": "jsd"}, 0.0168736),
        ({"divergence": "jsd", "beta": 0.9}, 0.00669882),
        ({"divergence": "jsd", "beta": 0}, 0.0615542),
        ({"divergence": "jsd", "beta": 1}, 0.0766673),
        ({"temperature": 2.0}, 0.0914167),
        ({"temperature": 2.0, "scaled": False}, 0.0914167 / 4),
    ],
)
def test_known_values(said, value):
    assert reference(ONE, TWO, **said).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("rest", "value"), [("zero", 0.161475), ("tail", 0.0615542)])
def test_known_values_of_the_two_most_probable_of_three_words(rest, value):
    stored = TopK(torch.tensor([[0, 1]]), TWO.log_softmax(-1)[:, :2], rest)
    assert reference(ONE, stored).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_divergences_of_plain_logits(kind, temperature):
    z, y = student().logits(), teacher().logits()
    rows = getattr(divergences, kind)(z, y, temperature=temperature)
    assert torch.allclose(reference(student(), teacher(), divergence=kind, temperature=temperature), rows.mean())
    mask = numbers(9, TOKENS) > 0
    said = {"divergence": kind, "temperature": temperature, "mask": mask}
    assert torch.allclose(reference(student(), y, total=5, **said), rows[mask].sum() / 5)
    assert torch.allclose(reference(student(), y, **said), rows[mask].mean())


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_tail_makes_all_words_but_one_exact_and_fewer_words_a_lower_bound(kind):
    whole = reference(student(), teacher(), divergence=kind)
    some = [reference(student(), top_k(k, "tail"), divergence=kind) for k in range(1, WORDS + 1)]
    assert torch.allclose(some[-1], whole) and torch.allclose(some[-2], whole)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(some))  # merging words never adds to a divergence


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_all_words_stored_leave_nothing_outside_whatever_rounding_says(backend):
    stored = top_k(WORDS, "tail")
    less = TopK(stored.ids, (stored.log_probs - 1e-4).float())
    right = reference(student(), teacher()).item()
    assert distillation_loss(student(), less, backend=backend).item() == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_the_other_words_compares_the_stored_ones_alone(kind):
    stored = top_k(4, "drop")
    z, y = (x.logits().gather(-1, stored.ids) for x in (student(), teacher()))
    assert torch.allclose(reference(student(), stored, divergence=kind), getattr(divergences, kind)(z, y).mean())


def test_one_certain_word_is_cross_entropy():
    words = torch.arange(TOKENS)[:, None]
    certain = TopK(words, torch.zeros(TOKENS, 1, dtype=F64))
    assert torch.allclose(reference(student(), certain), F.cross_entropy(student().logits(), words[:, 0]))


def test_stored_probabilities_that_sum_past_one_leave_no_tail():
    stored = top_k(3, "zero")
    renormalised = stored.log_probs.log_softmax(-1)
    more = TopK(stored.ids, renormalised + 1e-4)
    assert reference(student(), more).item() == pytest.approx(reference(student(), stored).item(), rel=1e-3)


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_gradients_of_first_and_second_order_are_those_of_the_value(kind, form):
    head, given = student(3, 5, 2), teachers(tokens=3, words=5)[form]

    def value(*parts):
        return reference(Head(*parts), given, divergence=kind, temperature=1.5)

    parts = (head.hidden, head.weight, head.bias)
    assert gradcheck(value, parts) and gradgradcheck(value, parts)


def test_the_teacher_is_a_constant():
    head = teacher()
    given = Head(head.hidden.requires_grad_(), head.weight.requires_grad_())
    reference(student(), given).backward()
    assert given.hidden.grad is None and given.weight.grad is None
