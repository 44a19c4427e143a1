"""The entry: checks, and the choice of a back end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backends import chosen
from .checks import check, check_ids, check_words
from .inputs import KINDS, Divergence, Head, Kind, Teacher, TopK


def distillation_loss(
    student: Head,
    teacher: Teacher,
    *,
    divergence: Kind = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scaled: bool | None = None,
    mask: Tensor | None = None,
    total: Tensor | float | None = None,
    vocabulary: int | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """sum over tokens of D(p, q) / total: a scalar, with gradients in the student's head but no [n, V] logits.

    p = softmax(teacher / T) and q = softmax(student / T) over V words; D is forward KL(p || q), reverse KL(q || p), or the
    generalised JSD beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1),
    in which beta 0 and 1 mean forward and reverse KL. The teacher is a constant.

        student, teacher = Head(hidden, lm_head.weight), Head(states, teacher_lm_head.weight)
        loss = distillation_loss(student, teacher, divergence="jsd", beta=0.1, mask=mask, total=tokens_of_the_step)

    student: hidden [..., D] and weight [V, D]. teacher: a Head with the same tokens and any width, logits [..., V],
        or a TopK [..., K] whose log-probabilities were stored at this temperature.
    scaled: times T^2, which keeps gradients comparable over temperatures; default: yes for KL, no for JSD.
    mask: bool [...], the tokens that count. What the others hold never enters, not even NaN, but they are computed:
        leave them out before where that is cheap.
    total: the normaliser, 0 being read as 1; default: the number of tokens that count. Hand in that of the whole
        optimiser step, and micro-batches add up to the whole batch.
    vocabulary: compare the first words only, where student and teacher are padded to different sizes.
    chunk: tokens at a time; default by size, 128 to 4096.
    backend: triton (on a GPU; not yet run on one), chunked (any device), reference (all logits at once, gradients of any
        order), or auto: triton on CUDA once it agrees with chunked on a small case there, else chunked above 2^22 logits,
        else reference.
    Raises ValueError with the mend where these do not fit each other.
    """
    measure = _divergence(divergence, beta, temperature, scaled)
    device = student.hidden.device.type
    student, teacher = _autocast(student, device), _autocast(teacher, device)
    check(student, teacher, mask, chunk, measure)
    student, teacher = _first(student, vocabulary), _first(teacher, vocabulary)
    check_words(student, teacher)
    keep = torch.ones_like(student.hidden[..., 0], dtype=torch.bool) if mask is None else mask
    student, teacher, keep = _rows(student, keep), _rows(teacher, keep), keep.flatten()
    teacher = _stored(teacher, len(student.weight))
    serve = chosen(backend, student, teacher)
    with torch.autocast(device, enabled=False):
        return serve(student, teacher, measure, keep, _normaliser(total, keep, student.weight), chunk)


def _divergence(kind: Kind, beta: float, temperature: float, scaled: bool | None) -> Divergence:
    if kind not in KINDS:
        raise ValueError(f"no divergence '{kind}': {', '.join(KINDS)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta}: give 0 to 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: give a number above 0")
    scaled = kind != "jsd" if scaled is None else scaled
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    return Divergence(kind, beta, temperature, temperature**2 if scaled else 1.0)


def _autocast(given: Any, device: str) -> Any:
    """A Head in the dtype of the surrounding autocast: the functions below run outside of it."""
    if not isinstance(given, Head) or given.hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return given
    dtype = torch.get_autocast_dtype(device)
    return Head(given.hidden.to(dtype), given.weight.to(dtype), None if given.bias is None else given.bias.to(dtype))


def _first(given: Any, vocabulary: int | None) -> Any:
    """The first words only, of a Head or logits; a TopK has no others if its ids are right."""
    if vocabulary is None or isinstance(given, TopK):
        return given
    if isinstance(given, Tensor):
        return given[..., :vocabulary]
    return Head(given.hidden, given.weight[:vocabulary], None if given.bias is None else given.bias[:vocabulary])


def _rows(given: Any, keep: Tensor) -> Any:
    """Tokens in one dimension [n, ...]; hidden states, ids and log-probabilities outside of `keep` are 0."""

    def rows(x: Tensor) -> Tensor:
        return x.masked_fill(~keep[..., None], 0).reshape(keep.numel(), x.shape[-1])

    if isinstance(given, Head):
        return replace(given, hidden=rows(given.hidden))
    if isinstance(given, TopK):
        return replace(given, ids=rows(given.ids), log_probs=rows(given.log_probs))
    return given.reshape(keep.numel(), given.shape[-1])  # as large as what must not be copied: masked by the chunk


def _stored(teacher: Teacher, words: int) -> Teacher:
    """With all words stored none are outside: what rounding leaves of 1 - sum p must not be compared with their q of 0."""
    check_ids(teacher, words)
    if isinstance(teacher, TopK) and teacher.ids.shape[-1] == words:
        return replace(teacher, rest="drop")
    return teacher


def _normaliser(total: Tensor | float | None, keep: Tensor, weight: Tensor) -> Tensor:
    total = keep.sum() if total is None else torch.as_tensor(total, device=weight.device).detach()
    total = total.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.where(total == 0, 1, total)
