"""Storing and recovering soft labels (FKD, arXiv 2112.01528)."""

from __future__ import annotations

import pytest
import torch

from fewstep.maths.soft_labels import LabelFormat, smooth_one_hot

NAMES = ["ori", "hard", "smoothing", "marginal_smoothing_k1", "marginal_smoothing_k3", "marginal_renorm_k3"]


def test_missing_mass_is_spread_evenly_over_the_other_classes():
    packed = {"indices": torch.tensor([[3, 1, 0]]), "values": torch.tensor([[0.6, 0.2, 0.1]])}
    spread = torch.tensor([[0.1, 0.2, 1 / 30, 0.6, 1 / 30, 1 / 30]])
    torch.testing.assert_close(LabelFormat.named("marginal_smoothing_k3").recover(packed, 6), spread)


def test_renormalising_leaves_nothing_on_the_other_classes():
    packed = {"indices": torch.tensor([[3, 1, 0]]), "values": torch.tensor([[0.6, 0.2, 0.1]])}
    renormed = torch.tensor([[0.1, 0.2, 0, 0.6, 0, 0]]) / 0.9
    torch.testing.assert_close(LabelFormat.named("marginal_renorm_k3").recover(packed, 6), renormed)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_recovered_rows_are_distributions(name, half):
    p = (8 * torch.randn(500, 10)).softmax(-1)
    form = LabelFormat.named(name, half)
    q = form.recover(form.pack(p), 10)
    assert q.dtype == torch.float32 and q.min() >= 0
    torch.testing.assert_close(q.sum(-1), torch.ones(500), rtol=0, atol=1e-6)
    assert torch.equal(q.argmax(-1), p.argmax(-1))


def test_formats_store_what_they_say():
    p = torch.tensor([[0.1, 0.6, 0.3]])
    assert torch.equal(LabelFormat.named("ori").pack(p)["values"], p)
    assert LabelFormat.named("hard").pack(p).keys() == {"indices"}
    assert torch.equal(LabelFormat.named("hard").recover({"indices": torch.tensor([[1]])}, 3), torch.eye(3)[[1]])
    smoothing = LabelFormat.named("smoothing", half=True).pack(p)
    assert smoothing["indices"].tolist() == [[1]] and smoothing["values"].dtype == torch.float16
    assert LabelFormat.named("smoothing") == LabelFormat.named("marginal_smoothing_k1")


@pytest.mark.parametrize("name", ["ori", "marginal_smoothing_k9", "marginal_renorm_k12"])
def test_nothing_is_lost_when_enough_is_stored(name):
    """Nine of ten probabilities decide the tenth; more than C are cut to C."""
    p = torch.randn(50, 10).softmax(-1)
    form = LabelFormat.named(name)
    torch.testing.assert_close(form.recover(form.pack(p), 10), p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["soft", "marginal_smoothing", "marginal_smoothing_k0", "ori "])
def test_unknown_formats_are_refused(name):
    with pytest.raises(ValueError, match="no label format"):
        LabelFormat.named(name)


def test_a_smoothed_label_keeps_one_minus_eps():
    p = smooth_one_hot(torch.tensor([2, 0]), 5, 0.2)
    torch.testing.assert_close(p, torch.tensor([[0.05, 0.05, 0.8, 0.05, 0.05], [0.8, 0.05, 0.05, 0.05, 0.05]]))
    assert torch.equal(smooth_one_hot(torch.tensor([1]), 3, 0.0), torch.eye(3)[[1]])
