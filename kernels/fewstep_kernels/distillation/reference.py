"""The plain definition of the distillation loss: all logits at once, gradients by autograd, of any order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .inputs import FLOOR, Divergence, Head, Teacher, TopK, teacher_buckets, teacher_logits, wide

ALL = slice(None)


def reference(student: Head, teacher: Teacher, divergence: Divergence, keep: Tensor, total: Tensor) -> Tensor:
    """factor * sum over kept tokens of D(p, q), over total: a scalar. Tokens are rows [n]; keep [n] bool."""
    z = wide(student.logits()) / divergence.temperature
    with torch.no_grad():
        log_p = _teacher_log_probs(teacher, divergence.temperature, keep)
    log_q = _log_softmax(_student_buckets(z, teacher) if isinstance(teacher, TopK) else z)
    rows = compare(log_q, log_p, divergence)
    return divergence.factor * torch.where(keep, rows, 0).sum() / total


def compare(log_q: Tensor, log_p: Tensor, divergence: Divergence) -> Tensor:
    """D(p, q) of each row: [n, V] and [n, V] to [n]."""
    if divergence.kind == "forward_kl":
        return _kl(log_p, log_q)
    if divergence.kind == "reverse_kl":
        return _kl(log_q, log_p)
    beta = divergence.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _teacher_log_probs(teacher: Teacher, temperature: float, keep: Tensor) -> Tensor:
    if isinstance(teacher, TopK):
        return teacher_buckets(teacher, ALL)
    return _log_softmax(wide(teacher_logits(teacher, ALL, keep)) / temperature)


def _student_buckets(z: Tensor, top: TopK) -> Tensor:
    """Logits of the K words and (unless dropped) of all others together: [n, K + 1 or K]."""
    words = z.gather(-1, top.ids)
    if top.rest == "drop":
        return words
    others = z.scatter(-1, top.ids, FLOOR).logsumexp(-1, keepdim=True)
    return torch.cat([words, others], -1)


def _log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1).clamp_min(FLOOR)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)
