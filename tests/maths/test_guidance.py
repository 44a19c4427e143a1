"""Classifier-free guidance: exact ends, one call, intervals, and the split of guidance into two directions."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.batch import Cond
from fewstep.maths.guidance import cfg, guided, guided_x0, same_norm
from fewstep.maths.paths import FlowPath, VPPath, add_noise, expand

F64 = torch.float64


@pytest.fixture
def network(oracle):
    """v depends on state, time and label in a way that mixes none of them across rows."""

    def net(x, k, cond):
        return torch.sin(x + 0.01 * k) + expand(cond["label"], x) * x**2

    return oracle.Network(FlowPath(), net)


@pytest.fixture
def asked(oracle, normal):
    """(x, t, cond) of three rows."""
    return normal(3, 2, 2), torch.tensor([0.2, 0.5, 0.9], dtype=F64), oracle.Cond(label=normal(3))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_formula_is_bit_exact_at_zero_and_one(dtype, normal):
    uncond, cond = normal(4, 50).to(dtype), (1e3 * normal(4, 50)).to(dtype)
    for scale in (0.0, torch.zeros(4)):
        assert torch.equal(cfg(uncond, cond, scale), uncond)
    for scale in (1.0, torch.ones(4)):
        assert torch.equal(cfg(uncond, cond, scale), cond)


def test_the_formula_extrapolates_by_rows(normal):
    uncond, cond, scale = normal(3, 5), normal(3, 5), torch.tensor([0.5, 2.0, 7.5], dtype=F64)
    assert torch.allclose(cfg(uncond, cond, scale), uncond + scale[:, None] * (cond - uncond), atol=1e-13)


def test_bfloat16_predictions_stay_bfloat16():
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    assert cfg(half, half, torch.tensor([2.0, 3.0])).dtype == torch.bfloat16


def test_scale_one_is_one_plain_call(network, asked):
    x, t, cond = asked
    assert torch.equal(guided(network, x, t, cond, 1.0), network.velocity(x, t, cond))
    assert network.calls == [3, 3]


@pytest.mark.parametrize("what", ["velocity", "x0"])
def test_any_other_scale_is_one_call_of_twice_the_rows(network, asked, what):
    x, t, cond = asked
    out = guided(network, x, t, cond, 4.0, what=what)
    assert network.calls == [6]
    predict = getattr(network, what)
    expected = cfg(predict(x, t, network.null(cond)), predict(x, t, cond), 4.0)
    assert torch.allclose(out, expected, atol=1e-13)


def test_a_row_of_scale_one_or_zero_is_the_plain_prediction(network, asked):
    x, t, cond = asked
    out = guided(network, x, t, cond, torch.tensor([1.0, 0.0, 3.0], dtype=F64))
    assert torch.allclose(out[0], network.velocity(x, t, cond)[0], atol=1e-15)
    assert torch.allclose(out[1], network.velocity(x, t, network.null(cond))[1], atol=1e-15)


def test_outside_the_interval_rows_are_not_guided(network, asked):
    x, t, cond = asked
    out = guided(network, x, t, cond, 3.0, interval=(0.3, 0.9))
    full = guided(network, x, t, cond, 3.0)
    assert torch.equal(out[1:], full[1:])  # both ends belong to the interval
    assert torch.allclose(out[0], network.velocity(x, t, cond)[0], atol=1e-15)
    by_rows = guided(network, x, t, cond, torch.tensor([9.0, 3.0, 3.0]), interval=(0.3, 0.9))
    assert torch.allclose(by_rows, out, atol=1e-15)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_guidance_in_x0_is_guidance_in_velocity(oracle, asked, sd, prediction):
    """Guidance is linear, so it may be applied to any prediction."""
    x, _, cond = asked
    path = VPPath.from_scheduler({**sd, "prediction_type": prediction})
    network = oracle.Network(path, lambda y, k, c: torch.tanh(y) + expand(c["label"], y))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    v = guided(network, x, t, cond, 5.0)
    assert torch.allclose(guided_x0(network, x, t, cond, 5.0), x - expand(t, x) * v, atol=1e-12)


def test_guided_minus_fake_splits_into_matching_and_augmentation(network, asked, oracle):
    """(real - fake) + (alpha - 1)(real - real_null) = guided real - fake at one level (arXiv 2511.22677)."""
    x, t, cond = asked
    fake = oracle.Network(FlowPath(), lambda y, k, c: torch.cos(y) * 0.3)
    real, null = network.x0(x, t, cond), network.x0(x, t, network.null(cond))
    matching, augmentation = real - fake.x0(x, t, cond), (6.0 - 1) * (real - null)
    coupled = guided_x0(network, x, t, cond, 6.0) - fake.x0(x, t, cond)
    assert torch.allclose(matching + augmentation, coupled, atol=1e-12)


def test_the_augmentation_field_of_equal_gaussians_does_not_depend_on_x(oracle, normal):
    """x0_c - x0_u = (m_c - m_u) t^2 / A(t) for two Gaussians of one variance (arXiv 2511.22677)."""
    cond, uncond = oracle.Gaussian(mean=1.3), oracle.Gaussian(mean=-0.2)
    t = torch.linspace(0.05, 1, 20, dtype=F64)
    x = add_noise(normal(20, 4), normal(20, 4), t)
    field = cond.x0(x, t) - uncond.x0(x, t)
    expected = 1.5 * t**2 / cond.variance(t)
    assert torch.allclose(field, expand(expected, x).expand_as(x), atol=1e-12)


def test_energy_preserving_guidance_keeps_the_conditional_norm():
    """x0 = guided |x0_c| / |guided|, row by row; scale 1 is one plain call, and without it x0 is the guided one."""
    asked: list[int] = []

    class Two:
        """x0 is twice the state with the condition 1 and minus the state with 0."""

        def x0(self, x, t, cond):
            asked.append(len(x))
            return torch.where(cond["label"][:, None] == 1, 2 * x, -x)

        def null(self, cond):
            return cond.with_(label=torch.zeros_like(cond["label"]))

    x, t, cond = torch.randn(5, 7), torch.full((5,), 0.5), Cond(label=torch.ones(5, dtype=torch.long))
    guided = guided_x0(Two(), x, t, cond, 3.0, rescale="energy")
    torch.testing.assert_close(guided, 2 * x)  # -x + 3 (2x + x) = 8x, at the length of 2x
    torch.testing.assert_close(guided_x0(Two(), x, t, cond, 3.0), 8 * x)
    torch.testing.assert_close(guided_x0(Two(), x, t, cond, 1.0, rescale="energy"), 2 * x)
    assert asked == [10, 10, 5]


def test_same_norm_is_taken_over_whole_rows():
    x, like = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    found = same_norm(x, like)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), like.flatten(1).norm(dim=1))
    torch.testing.assert_close(found / x, (found / x)[:, :1, :1].expand_as(x))
