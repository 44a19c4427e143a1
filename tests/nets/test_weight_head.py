"""The adaptive weight: neutral before training, one minimum, and there every level contributes equally."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.nets.weight_head import WeightHead

F64 = torch.float64


def angles(rows: int = 512) -> Tensor:
    """Evenly over [0, pi/2]."""
    return torch.linspace(0, math.pi / 2, rows, dtype=F64)


def hard(a: Tensor) -> Tensor:
    """A loss that is 150 times larger in the middle than at the ends."""
    return (5 * torch.sin(2 * a) ** 2 - 3).exp()


def test_it_weighs_nothing_before_training():
    """w = 0, e^w = 1."""
    assert (WeightHead()(angles().float()) == 0).all()


def test_a_row_is_weighed_by_its_own_angle():
    head = WeightHead()
    torch.nn.init.normal_(head.coefficients, generator=torch.Generator().manual_seed(0))
    a = angles(9).float()
    assert torch.equal(head(a)[2:4], head(a[2:4])) and head(a).std() > 0.1


def test_at_the_optimum_the_weight_is_the_inverse_of_the_expected_loss():
    """Minimising E[e^w l - w]: e^-w(a) = E[l | a], so that e^w E[l | a] = 1 at every level; noisy losses, Newton steps."""
    head, a = WeightHead().double(), angles()
    noise = torch.empty(len(a), 400, dtype=F64).exponential_(generator=torch.Generator().manual_seed(0))
    losses = hard(a)[:, None] * noise / noise.mean(1, keepdim=True)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = head(a)
        value = (w.exp()[:, None] * losses - w[:, None]).mean()
        value.backward()
        return value

    optimizer.step(closure)
    weighed = head(a).exp() * hard(a)
    torch.testing.assert_close(weighed, torch.ones_like(a), rtol=0, atol=1e-3)


def test_the_objective_is_convex_in_the_parameters():
    """Its Hessian sum_i e^w l phi phi^T has no negative eigenvalue at a random place: one minimum."""
    head, a = WeightHead().double(), angles(64)
    at = torch.randn(16, dtype=F64, generator=torch.Generator().manual_seed(1))

    def objective(coefficients: Tensor) -> Tensor:
        w = torch.func.functional_call(head, {"coefficients": coefficients}, (a,))
        return (w.exp() * hard(a) - w).mean()

    assert torch.linalg.eigvalsh(torch.func.hessian(objective)(at)).min() > 0


def test_it_stays_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert WeightHead()(angles().float()).dtype == torch.float32
