"""Which back end serves, and what bad input is told."""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import replace

import pytest
import torch
from fewstep_kernels.distillation import BACKENDS, Head, TopK, backends, distillation_loss

from .cases import KINDS, TOKENS, WORDS, numbers, student, teacher, top_k

F64, F32 = torch.float64, torch.float32
IDS = torch.zeros(TOKENS, 3, dtype=torch.int64)


def on_meta(head: Head, words: int | None = None) -> Head:
    """Shapes without numbers."""
    weight = head.weight if words is None else head.weight[:1].expand(words, -1)
    return Head(head.hidden.to("meta"), weight.to("meta"))


def test_auto_takes_chunks_above_four_million_logits():
    assert backends.automatic(student(), teacher()) == "reference"
    assert backends.automatic(on_meta(student(), words=2**22 // TOKENS), teacher()) == "reference"
    assert backends.automatic(on_meta(student(), words=2**22 // TOKENS + 1), teacher()) == "chunked"


def test_auto_serves_as_the_back_end_it_chose(monkeypatch):
    right = distillation_loss(student(), teacher(), backend="reference")
    served = []
    for name, serve in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, lambda *parts, n=name, f=serve: served.append(n) or f(*parts))
    for large in (1, 10**9):
        monkeypatch.setattr(backends, "LARGE", large)
        assert torch.allclose(distillation_loss(student(), teacher()), right)
    assert served == ["chunked", "reference"]


def test_kernels_are_proven_by_agreement_and_a_failure_is_told(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    cpu = torch.device("cpu")

    def wrong(z, y, measure):
        value, gradient = backends.TORCH.compare(z, y, measure)
        return value, gradient * 1.01

    def broken(*_):
        raise RuntimeError("no such instruction")

    for compare, good, said in (
        (None, True, "triton differs"),
        (wrong, False, "chunked"),
        (broken, False, "no such instruction"),
    ):
        ops = replace(backends.TORCH, **({} if compare is None else {"compare": compare}))
        monkeypatch.setitem(sys.modules, "fewstep_kernels.distillation.rows", types.SimpleNamespace(TRITON=ops))
        backends.proven.cache_clear()
        assert backends.proven(cpu, F32) is good
        assert backends.proven(cpu, F32) is good
        assert sum(said in record.message for record in caplog.records) == 1  # once a choice
        caplog.clear()
    backends.proven.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "no back end 'cuda' of the distillation loss: auto, triton, chunked, reference"),
        ({"backend": "triton"}, "backend='triton' does not take float64: write chunked, reference or auto"),
        ({"divergence": "kl"}, "no divergence 'kl': forward_kl, reverse_kl, jsd"),
        ({"beta": 1.5}, "beta=1.5: give 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
        ({"chunk": 0}, "chunk=0: give at least 1"),
        ({"mask": torch.ones(TOKENS)}, r"mask is float32 \[7\]: give bool \[7\]"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask is bool \[2\]: give bool \[7\]"),
        ({"mask": torch.ones(TOKENS, dtype=torch.bool, device="meta")}, "student is on cpu and mask on meta: move one"),
    ],
)
def test_a_wrong_option_is_told_what_is_right(change, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(student(), teacher(), **change)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    ("head", "given", "message"),
    [
        (student(3), teacher(4), r"student has tokens \[3\] and teacher \[4\]: give the same tokens"),
        (
            student(words=9),
            teacher(),
            "student has 9 words and teacher 11: if the first 9 are the same, give vocabulary=9",
        ),
        (student(), teacher(words=9).logits(), "student has 11 words and teacher 9: .* give vocabulary=9"),
        (
            Head(numbers(0, 7, 5), numbers(0, 11, 4)),
            teacher(),
            r"student: hidden \[7, 5\] does not fit weight \[11, 4\]",
        ),
        (student(), Head(numbers(0, 7, 5), numbers(0, 11)), r"teacher: hidden \[7, 5\] does not fit weight \[11\]"),
        (replace(student(), bias=numbers(0, 4)), teacher(), r"student: bias \[4\] does not fit weight \[11, 4\]"),
        (
            replace(student(), bias=numbers(0, 11).float()),
            teacher(),
            "hidden, weight and bias are float64, float64, float32: give one floating dtype",
        ),
        (
            Head(numbers(0, 7, 4).float(), numbers(0, 11, 4)),
            teacher(),
            "are float32, float64: .*autocast",
        ),
        (
            Head(torch.ones(7, 4).long(), torch.ones(11, 4).long()),
            teacher(),
            "are int64, int64: give one floating",
        ),
        (student(), torch.ones(TOKENS, WORDS).long(), "teacher is int64: give a floating dtype"),
        (student(), on_meta(teacher()), "student is on cpu and teacher on meta: move one"),
        (
            Head(student().hidden, numbers(0, 11, 4).to("meta")),
            teacher(),
            "hidden is on cpu and weight on meta: move one",
        ),
        (student(), TopK(IDS.int(), numbers(0, 7, 3)), r"ids are int32 \[7, 3\] and log_probs \[7, 3\]: give int64"),
        (student(), TopK(IDS, numbers(0, 7, 2)), r"ids are int64 \[7, 3\] and log_probs \[7, 2\]: .* same shape"),
        (student(), TopK(IDS + 11, numbers(0, 7, 3)), "ids run from 11 to 11 and the student has 11 words"),
        (student(), TopK(IDS - 1, numbers(0, 7, 3)), "ids run from -1 to -1 and the student has 11 words"),
        (student(), TopK(IDS, numbers(0, 7, 3), "spread"), "no rest 'spread': tail, zero, drop"),
    ],
)
def test_inputs_that_do_not_fit_are_told_how_they_would(head, given, message, backend):
    with pytest.raises(ValueError, match=message):
        distillation_loss(head, given, backend=backend)


@pytest.mark.parametrize("said", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 1}])
@pytest.mark.parametrize("rest", ["tail", "zero"])
def test_reverse_kl_of_a_top_k_is_refused_where_it_would_be_infinite(rest, said):
    with pytest.raises(ValueError, match="use forward_kl, jsd or rest='drop'"):
        distillation_loss(student(), top_k(3, rest), **said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_triton_on_cpu_tensors_is_refused_with_the_names_that_serve(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    head, given = student(dtype=F32), teacher(dtype=F32)
    with pytest.raises(ValueError, match="does not run on cpu: write chunked, reference or auto"):
        distillation_loss(head, given, backend="triton")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton: write chunked, reference or auto"):
        distillation_loss(head, given, backend="triton")


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_vocabulary_leaves_out_what_only_one_side_has(kind, backend):
    head, given = student(words=WORDS), teacher(words=WORDS)
    short = Head(head.hidden, head.weight[:8], head.bias[:8]), Head(given.hidden, given.weight[:8])
    right = distillation_loss(*short, divergence=kind)
    for other in (given, given.logits(), Head(given.hidden, given.weight[:9])):
        found = distillation_loss(head, other, divergence=kind, vocabulary=8, backend=backend)
        assert torch.allclose(found, right)
    gradient = torch.autograd.grad(found, head.weight)[0]
    assert gradient[:8].abs().min() > 0 and not gradient[8:].any()
