"""Divergences over a vocabulary: known values, and closed-form gradients."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fewstep.maths.divergences import forward_kl, jsd, reverse_kl

F64 = torch.float64
TEACHER = torch.tensor([2.0, 0.0, 0.0], dtype=F64)
STUDENT = torch.tensor([1.0, 0.0, -1.0], dtype=F64)
ALL = [forward_kl, reverse_kl, jsd, partial(jsd, beta=0.1), partial(jsd, beta=0.9)]


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (forward_kl, 0.0615542),
        (reverse_kl, 0.0766673),
        (partial(jsd, beta=0.1), 0.00563181),
        (jsd, 0.0168736),
        (partial(jsd, beta=0.9), 0.00669882),
        (partial(forward_kl, temperature=2.0), 0.0914167),
    ],
)
def test_known_values(divergence, expected):
    assert divergence(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("divergence", ALL)
def test_divergences_are_positive_and_zero_for_equal_distributions(divergence, normal):
    z, y = normal(4, 3, 11), normal(4, 3, 11)
    assert divergence(z, y).shape == (4, 3)
    assert (divergence(z, y) > 0).all()
    assert divergence(z, z + 5).abs().max() < 1e-14


def test_jsd_is_symmetric_under_swapping_both_and_bounded(normal):
    z, y = 20 * normal(50, 7), 20 * normal(50, 7)
    assert torch.allclose(jsd(z, y, 0.3), jsd(y, z, 0.7), atol=1e-14)
    assert jsd(z, y).max() <= math.log(2) + 1e-14


def test_jsd_ends_are_the_two_divergences_by_convention(normal):
    z, y = normal(5, 7), normal(5, 7)
    assert torch.equal(jsd(z, y, 0.0), forward_kl(z, y))
    assert torch.equal(jsd(z, y, 1.0), reverse_kl(z, y))
    assert torch.allclose(jsd(z, y, 1e-7) / 1e-7, forward_kl(z, y), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("beta", [None, "reverse", 0.1, 0.5, 0.9])
def test_gradients_in_the_students_logits(normal, temperature, beta):
    """(q - p)/T; q (w - E_q w)/T with w = log q - log p; (1 - beta) q (w - E_q w)/T with w = log q - log m."""
    z, y = normal(6, 9).requires_grad_(), normal(6, 9)
    log_q, log_p = (z.detach() / temperature).log_softmax(-1), (y / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if beta is None:
        loss = forward_kl(z, y, temperature, scaled=False)
        expected = (q - p) / temperature
    elif beta == "reverse":
        loss, w, factor = reverse_kl(z, y, temperature, scaled=False), log_q - log_p, 1.0
        expected = factor * q * (w - (q * w).sum(-1, keepdim=True)) / temperature
    else:
        loss, w = jsd(z, y, beta, temperature), log_q - (beta * p + (1 - beta) * q).log()
        expected = (1 - beta) * q * (w - (q * w).sum(-1, keepdim=True)) / temperature
    assert torch.allclose(torch.autograd.grad(loss.sum(), z)[0], expected, atol=1e-14)


@pytest.mark.parametrize("divergence", ALL)
def test_scaling_multiplies_by_the_square_of_the_temperature(divergence, normal):
    z, y = normal(5, 7), normal(5, 7)
    scaled, plain = (divergence(z, y, temperature=3.0, scaled=flag) for flag in (True, False))
    assert torch.allclose(scaled, 9 * plain, atol=1e-14)


@pytest.mark.parametrize("divergence", ALL)
def test_masked_words_count_nothing_in_value_and_gradient(divergence, normal):
    """Logits of -inf in both: the same as leaving the words out."""
    z, y = normal(4, 6), normal(4, 6)
    masked = z.clone().index_fill_(1, torch.tensor([1, 4]), -math.inf).requires_grad_()
    other = y.index_fill(1, torch.tensor([1, 4]), -math.inf)
    short = z[:, [0, 2, 3, 5]].clone().requires_grad_()
    whole, left = divergence(masked, other), divergence(short, y[:, [0, 2, 3, 5]])
    assert torch.allclose(whole, left, atol=1e-14)
    gradient = torch.autograd.grad(whole.sum(), masked)[0]
    assert torch.allclose(gradient[:, [0, 2, 3, 5]], torch.autograd.grad(left.sum(), short)[0], atol=1e-14)
    assert torch.equal(gradient[:, [1, 4]], torch.zeros(4, 2, dtype=F64))


@pytest.mark.parametrize("divergence", ALL)
def test_extreme_logits_stay_finite(divergence):
    z = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = divergence(z, torch.tensor([[-1e4, 0.0, 1e4]]))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), z)[0]).all()


def test_half_precision_logits_are_compared_in_float32(normal):
    z, y = normal(4, 1000).bfloat16(), normal(4, 1000).bfloat16()
    loss = forward_kl(z, y)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, forward_kl(z.double(), y.double()).float(), rtol=1e-5)
