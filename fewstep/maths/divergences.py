"""Divergences between two distributions over a vocabulary, from logits [..., V] to [...].

p = softmax(teacher / T), q = softmax(student / T); inputs below float32 are raised to it. Nothing is averaged: masks
and normalisers are the caller's. `scaled` multiplies by T^2, which keeps gradients comparable over temperatures
(Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, scaled: bool = True) -> Tensor:
    """KL(p || q) = sum p (log p - log q); gradient in the student's logits (q - p) / T, times T^2 when `scaled`."""
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    return _factor(temperature, scaled) * _kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, scaled: bool = True) -> Tensor:
    """KL(q || p); gradient q (w - E_q w) / T with w = log q - log p, times T^2 when `scaled`."""
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    return _factor(temperature, scaled) * _kl(log_q, log_p)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0, scaled: bool = False) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1).

    beta = 0 and beta = 1 mean forward and reverse KL, as public trainers have it. That is a convention and not a limit:
    the divergence itself vanishes there (jsd / beta tends to the forward KL), so beta .01 and 0 differ a hundredfold.
    """
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student, teacher, temperature, scaled)
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return _factor(temperature, scaled) * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    # Words masked by -inf get a finite floor of probability 0, which keeps 0 * log 0 and its gradient at 0.
    log = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
    return log.clamp_min(-1e30)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _factor(temperature: float, scaled: bool) -> float:
    return temperature**2 if scaled else 1.0
