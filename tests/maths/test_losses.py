"""Losses per row: values against definitions, gradients against their closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fewstep.errors import UserError
from fewstep.maths.losses import (
    cosine_rows,
    cross_entropy_rows,
    discriminator_rows,
    generator_rows,
    l1_rows,
    mean_variance_rows,
    mse_rows,
    pseudo_huber_norm_rows,
    pseudo_huber_rows,
    pull,
)


@pytest.fixture
def pair(normal):
    return normal(3, 2, 4).requires_grad_(), normal(3, 2, 4)


def grad(rows, x):
    return torch.autograd.grad(rows.sum(), x)[0]


def test_mse_and_l1_are_means_over_a_row(pair):
    a, b = pair
    assert torch.allclose(mse_rows(a, b), F.mse_loss(a, b, reduction="none").mean((1, 2)), atol=1e-15)
    assert torch.allclose(l1_rows(a, b), (a - b).abs().mean((1, 2)), atol=1e-15)
    assert torch.equal(mse_rows(a[:, 0, 0], b[:, 0, 0]), (a - b)[:, 0, 0] ** 2)


def test_rows_do_not_see_each_other(pair):
    a, b = pair
    functions = (mse_rows, l1_rows, cosine_rows, lambda x, y: pseudo_huber_rows(x, y, 0.1))
    for function in functions:
        assert torch.allclose(function(a, b)[1], function(a[1:2], b[1:2])[0], atol=1e-15)


@pytest.mark.parametrize("c", [0.001, 0.3])
def test_pseudo_huber_value_and_gradient(pair, c):
    """sqrt(e^2 + c^2) - c, gradient e / sqrt(e^2 + c^2)."""
    a, b = pair
    e = a - b
    rows = pseudo_huber_rows(a, b, c)
    assert torch.allclose(rows, ((e**2 + c**2).sqrt() - c).mean((1, 2)), atol=1e-14)
    assert torch.allclose(grad(rows, a), (e / (e**2 + c**2).sqrt()).detach() / 8, atol=1e-14)


def test_pseudo_huber_keeps_its_digits_for_small_errors_in_float32():
    error = torch.full((1, 4), 1e-6)
    assert pseudo_huber_rows(error, torch.zeros(1, 4), 0.001).item() == pytest.approx(5e-10, rel=1e-5)
    assert pseudo_huber_rows(error * 0, error * 0, 0.001).item() == 0.0


def test_pseudo_huber_norm_has_one_kink_a_row(pair):
    """sqrt(|a - b|^2 + c^2) - c over the whole row, which is 0 at agreement and |a - b| - c far away."""
    a, b = pair
    distance = (a - b).flatten(1).norm(dim=1)
    assert torch.allclose(pseudo_huber_norm_rows(a, b, 0.3), (distance**2 + 0.09).sqrt() - 0.3)
    assert torch.allclose(pseudo_huber_norm_rows(1e6 * a, 1e6 * b, 0.3), 1e6 * distance - 0.3)
    assert torch.equal(pseudo_huber_norm_rows(a, a, 0.3), torch.zeros(len(a), dtype=a.dtype))


def test_margin_generator_stops_beyond_one():
    """relu(1 - D(fake))."""
    fake = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    rows = generator_rows(fake, "margin")
    rows.sum().backward()
    assert rows.tolist() == [2.0, 0.5, 0.0] and fake.grad.tolist() == [-1.0, -1.0, 0.0]


def test_cosine_is_zero_along_and_two_against(pair):
    a, _ = pair
    assert torch.allclose(cosine_rows(a, 3 * a), torch.zeros(3, dtype=a.dtype), atol=1e-14)
    assert torch.allclose(cosine_rows(a, -a), torch.full((3,), 2.0, dtype=a.dtype), atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_ids_is_that_of_one_hot_rows(normal, smoothing):
    logits, ids = normal(3, 5, 7), torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    by_ids = cross_entropy_rows(logits, ids, smoothing)
    q = (1 - smoothing) * F.one_hot(ids, 7).double() + smoothing / 7
    assert by_ids.shape == (3, 5)
    assert torch.allclose(by_ids, -(q * logits.log_softmax(-1)).sum(-1), atol=1e-14)
    assert torch.allclose(by_ids, cross_entropy_rows(logits, F.one_hot(ids, 7), smoothing), atol=1e-14)


def test_cross_entropy_of_an_empty_selection_is_empty():
    assert cross_entropy_rows(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_pull_moves_along_the_direction_and_nowhere_else(pair):
    """d/dx 0.5 mean (x - sg[x + D])^2 = -D / elements; no gradient reaches the networks that made D."""
    x, _ = pair
    made = torch.ones(3, 2, 4, dtype=x.dtype, requires_grad=True)
    direction = made * torch.arange(24.0, dtype=x.dtype).reshape(3, 2, 4)
    rows = pull(x, direction)
    assert torch.allclose(rows, 0.5 * (direction**2).mean((1, 2)), atol=1e-10)
    to_x, to_made = torch.autograd.grad(rows.sum(), (x, made), allow_unused=True)
    assert torch.allclose(to_x, -direction.detach() / 8, atol=1e-14)
    assert to_made is None


def test_pull_by_two_directions_adds_up(pair, normal):
    x, _ = pair
    one, two = normal(3, 2, 4), normal(3, 2, 4)
    assert torch.allclose(grad(pull(x, one) + pull(x, two), x), grad(pull(x, one + two), x), atol=1e-14)


def test_mean_variance_is_zero_exactly_where_both_agree(normal):
    x = normal(4, 3, 50)
    x = (x - x.mean((1, 2), keepdim=True)) / x.flatten(1).std(1, correction=0)[:, None, None]
    right = 0.075 + 0.9 * x
    assert torch.allclose(mean_variance_rows(right, 0.075, 0.81), torch.zeros(4, dtype=x.dtype), atol=1e-14)
    for wrong in (right + 0.1, 1.1 * right, 0.9 * right):
        assert (mean_variance_rows(wrong, 0.075, 0.81) > 1e-4).all()


def test_mean_variance_is_the_divergence_of_two_gaussians(normal):
    x = 1.3 * normal(2, 400) - 0.4
    mu, sigma = x.mean(1), x.std(1, correction=0)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0.2, torch.tensor(0.7, dtype=x.dtype))
    )
    assert torch.allclose(mean_variance_rows(x, 0.2, 0.49), kl, atol=1e-14)


def test_mean_variance_pushes_spread_and_mean_the_right_way(normal):
    x = normal(1, 100)
    for scale, sign in ((2.0, 1), (0.5, -1)):  # too wide: along x, the gradient is positive
        wide = (scale * x).requires_grad_()
        assert (grad(mean_variance_rows(wide, 0.0, 1.0), wide) * wide).sum().sign() == sign
    shifted = (x - x.mean() + 0.5).requires_grad_()
    assert grad(mean_variance_rows(shifted, 0.0, 1.0), shifted).sum() > 0


def test_mean_variance_of_a_constant_row_is_finite():
    x = torch.zeros(1, 8, requires_grad=True)
    rows = mean_variance_rows(x, 0.0, 1.0)
    assert torch.isfinite(rows).all()
    assert torch.isfinite(grad(rows, x)).all()


@pytest.mark.parametrize(
    ("kind", "generator", "discriminator"),
    [
        ("softplus", [1.313262, 0.126928], [1.313262 + 0.313262, 0.126928 + 2.126928]),
        ("hinge", [1.0, -2.0], [0.0 + 0.0, 0.0 + 3.0]),
        ("linear", [1.0, -2.0], [-1.0 - 1.0, 2.0 - 2.0]),
    ],
)
def test_adversarial_terms(kind, generator, discriminator):
    fake = torch.tensor([[-1.0], [2.0]])
    real = torch.tensor([[-1.0], [2.0]]) if kind == "softplus" else torch.tensor([[1.0], [2.0]])
    assert generator_rows(fake, kind).tolist() == pytest.approx(generator, abs=1e-5)
    assert discriminator_rows(real, fake, kind).tolist() == pytest.approx(discriminator, abs=1e-5)


@pytest.mark.parametrize("kind", ["softplus", "hinge", "linear"])
def test_generator_wants_high_fakes_and_discriminator_low_ones(kind):
    fake, real = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    assert (grad(generator_rows(fake, kind), fake) < 0).all()
    to_real, to_fake = torch.autograd.grad(discriminator_rows(real, fake, kind).sum(), (real, fake))
    assert (to_real < 0).all()
    assert (to_fake > 0).all()


def test_an_unknown_adversarial_loss_is_named():
    with pytest.raises(UserError, match="did you mean 'hinge'"):
        generator_rows(torch.zeros(1), "hinje")


def test_half_precision_is_computed_in_float32():
    a, b = torch.full((1, 4096), 0.01, dtype=torch.float16), torch.zeros(1, 4096, dtype=torch.float16)
    for rows in (mse_rows(a, b), l1_rows(a, b), pseudo_huber_rows(a, b, 0.001), cosine_rows(a, a), pull(a, a)):
        assert rows.dtype == torch.float32
    assert mse_rows(a, b).item() == pytest.approx(1e-4, rel=1e-3)
