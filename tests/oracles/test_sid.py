"""SiD against closed forms (Zhou et al., arXiv 2404.04057), with one-dimensional Gaussians.

The generator makes x_g = a z + b, the teacher knows N(m, s^2), and the fake model is the exact denoiser of N(b, a^2).
With A(x) = (1-t)^2 x^2 + t^2 and c_x = t^2 / A(x). Everything is at most quadratic in (z, eps), so a quadrature with
three nodes a variable gives expectations exactly.
"""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.methods.diffusion.sid import LOSSES, SiD, direction_terms, sid_terms
from fewstep.models.oracle import GAUSSIAN
from tests.oracles.harness import Affine, batch, gaussian_wasserstein2, samples, seat, train

M, S, T = 0.4, 0.7, 0.6
NODES = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
MASS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
Z, EPS = (g.flatten()[:, None] for g in torch.meshgrid(NODES, NODES, indexing="ij"))
P = (MASS[:, None] * MASS).flatten()


def spread(x: float, t: float = T) -> float:
    """A(x)."""
    return (1 - t) ** 2 * x**2 + t**2


def c(x: float) -> float:
    """c_x."""
    return T**2 / spread(x)


def denoised(x: torch.Tensor, mean: torch.Tensor | float, std: torch.Tensor | float) -> torch.Tensor:
    """E[x0 | x_t = x] for N(mean, std^2), with frozen parameters."""
    mean, std = float(mean), float(std)
    return mean + (1 - T) * std**2 / spread(std) * (x - (1 - T) * mean)


def expectation(loss, a: float, b: float, alpha: float) -> tuple[float, float, float]:
    """(value, d/da, d/db) of E loss with the exact fake model held fixed."""
    gain, offset = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
    x0 = gain * Z + offset
    x = (1 - T) * x0 + T * EPS
    rows = loss(x0, denoised(x, M, S), denoised(x, b, a), alpha)[:, 0]
    value = (P * rows).sum()
    da, db = torch.autograd.grad(value, (gain, offset))
    return value.item(), da.item(), db.item()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_both_ways_of_writing_the_loss_are_equal(alpha):
    """(y_r - y_f) [(y_r - x) - alpha d] = (1 - alpha) d^2 + d (y_f - x)."""
    x, real, fake = torch.randn(3, 64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d = real - fake
    other = (1 - alpha) * d**2 + d * (fake - x)
    torch.testing.assert_close(sid_terms(x, real, fake, alpha), other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradient_of_the_mean_does_not_depend_on_alpha(alpha):
    """At a = s: dL/db = -c_s^2 (m - b)."""
    _, _, db = expectation(sid_terms, S, 0.1, alpha)
    assert db == pytest.approx(-(c(S) ** 2) * (M - 0.1), rel=1e-10)


@pytest.mark.parametrize("a", [0.3, 0.6, 0.9, 2.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradient_of_the_width(alpha, a):
    """At b = m: dL/da = 2 a (1-t) D [(1-alpha) (1-t) D - c_a] with (1-t) D = c_a - c_s."""
    _, da, _ = expectation(sid_terms, a, M, alpha)
    gap = c(a) - c(S)
    assert da == pytest.approx(2 * a * gap * ((1 - alpha) * gap - c(a)), rel=1e-9)


def test_alpha_above_one_pushes_the_wrong_way_beyond_a_ratio_of_six():
    """For alpha = 1.2 the sign flips where A(a) / A(s) = alpha / (alpha - 1) = 6; for alpha = 1 it never does."""
    wide = {ratio: math.sqrt((ratio * spread(S) - T**2) / (1 - T) ** 2) for ratio in (5.9, 6.1)}
    assert expectation(sid_terms, wide[5.9], M, 1.2)[1] > 0  # too wide, so a gradient step narrows
    assert expectation(sid_terms, wide[6.1], M, 1.2)[1] < 0
    assert expectation(sid_terms, wide[6.1], M, 1.0)[1] > 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_value_at_the_exact_fake_model_is_no_measure_of_progress(alpha):
    """E L = (1 - alpha) E|d|^2: zero at alpha 1, negative at 1.2, whatever the distance to the teacher."""
    value, _, _ = expectation(sid_terms, 0.5, 0.1, alpha)
    x0 = 0.5 * Z + 0.1
    x = (1 - T) * x0 + T * EPS
    gap = ((P[:, None] * (denoised(x, M, S) - denoised(x, 0.1, 0.5)) ** 2).sum()).item()
    assert gap > 0.01
    assert value == pytest.approx((1 - alpha) * gap, abs=1e-12)


def test_diff_instruct_is_the_direction_alone():
    """dL/db = -E d and dL/da = -E d z: no term passes through a network."""
    _, da, db = expectation(direction_terms, 0.5, 0.1, 1.0)
    x = (1 - T) * (0.5 * Z + 0.1) + T * EPS
    d = denoised(x, M, S) - denoised(x, 0.1, 0.5)
    assert db == pytest.approx(-(P[:, None] * d).sum().item(), rel=1e-12)
    assert da == pytest.approx(-(P[:, None] * d * Z).sum().item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_teacher_and_fake_give_no_gradient(loss):
    """d = 0: nothing to learn, whichever form the loss has."""
    x0 = torch.randn(8, 4, requires_grad=True)
    both = 0.3 * x0
    rows = LOSSES[loss](x0, both, both, 1.2)
    (gradient,) = torch.autograd.grad(rows.sum(), x0)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("alpha, loss", [(0.5, "sid"), (1.0, "sid"), (1.2, "sid"), (1.0, "diff_instruct")])
def test_a_linear_student_reaches_the_teacher(alpha, loss):
    """With a fake model that is itself learnt, W2 to the teacher ends within 5 % of the data's std."""
    settings = {"alpha": alpha, "loss": loss, "fake_updates": 2, "weights": {"sid": 1.0}}
    method = SiD(SiD.Config(**settings))
    nets = {"teacher": GAUSSIAN.build(means=[[M]], std=[S]).module, "student": Affine(0.5, -0.2)}
    nets["fake_score"] = GAUSSIAN.build(means=[[-0.2]], std=[0.5]).module
    seat(method, nets)
    rates = {"student": 5e-3, "fake_score": 2e-2}
    optimizers = {n: torch.optim.Adam(nets[n].parameters(), lr, betas=(0.5, 0.9)) for n, lr in rates.items()}

    def slow_down(count, _update):
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name] * max(0.02, 1 - count / 1500)

    train(method, range(1000), lambda _: batch(256), optimizers, after=slow_down)
    points = samples(method, method.schedule(), 4096)
    assert gaussian_wasserstein2(points, torch.tensor([M]), torch.tensor([[S**2]])) < 0.05 * S
