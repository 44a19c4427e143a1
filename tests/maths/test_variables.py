"""Changes of variables at one level (the conversions of arXiv 2511.22677 and of flow matching)."""

from __future__ import annotations

import pytest
import torch

from fewstep.maths.paths import add_noise, eps_from_velocity, expand, score_from_velocity, x0_from_velocity
from fewstep.maths.variables import FLOW, PREDICTIONS


@pytest.fixture
def pair(normal):
    return normal(4, 3, 2), normal(4, 3, 2), torch.tensor([0.05, 0.4, 0.7, 0.95], dtype=torch.float64)


def test_velocity_gives_back_the_pair(pair):
    x0, eps, t = pair
    x, v = add_noise(x0, eps, t), eps - x0
    assert torch.allclose(x0_from_velocity(x, v, t), x0, atol=1e-14)
    assert torch.allclose(eps_from_velocity(x, v, t), eps, atol=1e-14)
    assert torch.allclose(score_from_velocity(x, v, t), -eps / expand(t, x), atol=1e-12)


def test_differences_of_predictions_are_proportional_in_every_space(pair):
    """x0_A - x0_B = -t (v_A - v_B) = -(t/(1-t)) (eps_A - eps_B) = t^2/(1-t) (score_A - score_B)."""
    x, v_a, t = pair
    v_b = v_a.flip(0)
    s = expand(t, x)
    gap = x0_from_velocity(x, v_a, t) - x0_from_velocity(x, v_b, t)
    eps_gap = eps_from_velocity(x, v_a, t) - eps_from_velocity(x, v_b, t)
    score_gap = score_from_velocity(x, v_a, t) - score_from_velocity(x, v_b, t)
    assert torch.allclose(gap, -s * (v_a - v_b), atol=1e-12)
    assert torch.allclose(eps_gap, (1 - s) * (v_a - v_b), atol=1e-12)
    assert torch.allclose(gap, -s / (1 - s) * eps_gap, atol=1e-12)
    assert torch.allclose(gap, s**2 / (1 - s) * score_gap, atol=1e-12)


@pytest.mark.parametrize("name", ["flow", *PREDICTIONS])
def test_the_target_of_a_pair_means_its_velocity(pair, name):
    x0, eps, t = pair
    kind = {"flow": FLOW, **PREDICTIONS}[name]
    x, s = add_noise(x0, eps, t), expand(t, x0)
    assert torch.allclose(kind.velocity(kind.target(x0, eps, s), x, s), eps - x0, atol=1e-12)
    assert torch.allclose(kind.output(eps - x0, x, s), kind.target(x0, eps, s), atol=1e-12)


@pytest.mark.parametrize(("name", "x0_of", "eps_of"), [
    ("epsilon", lambda x, o, a, s: (x - s * o) / a, lambda x, o, a, s: o),
    ("v_prediction", lambda x, o, a, s: a * x - s * o, lambda x, o, a, s: s * x + a * o),
    ("sample", lambda x, o, a, s: o, lambda x, o, a, s: (x - a * o) / s),
])  # fmt: skip
def test_variance_preserving_predictions_read_in_flow_variables(pair, name, x0_of, eps_of):
    """With x = (a + s) y and t = s / (a + s): v is eps - x0 of the textbook formulas in a and s."""
    y, output, t = pair
    unit = (t**2 + (1 - t) ** 2) ** 0.5
    a, s = expand((1 - t) / unit, y), expand(t / unit, y)
    x = (a + s) * y
    expected = eps_of(x, output, a, s) - x0_of(x, output, a, s)
    assert torch.allclose(PREDICTIONS[name].velocity(output, y, expand(t, y)), expected, atol=1e-12)


def test_expand_keeps_float64_and_never_goes_below_float32():
    t = torch.tensor([0.3, 0.6])
    assert expand(t, torch.zeros(2, 3, 4)).shape == (2, 1, 1)
    assert expand(t.double(), torch.zeros(2, 3)).dtype == torch.float32
    assert expand(t, torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert expand(t, torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert expand(0.5, torch.zeros(2, 3)).ndim == 0
