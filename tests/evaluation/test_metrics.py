"""Metrics by name on sets whose scores are known."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.metrics import EvaluationSet, accuracy, diversity, fid, mean_pairwise_distance, precision_recall
from fewstep.evaluation.registry import METRICS

NAMES = {"fid": {"fid"}, "prdc": {"precision", "recall", "density", "coverage"}}


def _features(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_every_metric_gives_numbers_under_its_names():
    labels = torch.arange(40) % 4
    data = EvaluationSet(_features(40), _features(50, seed=1), labels, torch.eye(4)[labels])
    for name in METRICS.names():
        values = METRICS.get(name)(data)
        assert values.keys() == NAMES.get(name, {name})
        assert all(isinstance(value, float) for value in values.values())


def test_accuracy_is_the_share_of_images_in_the_class_asked_for():
    labels = torch.tensor([0, 1, 2, 2])
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    assert accuracy(EvaluationSet(_features(4), labels=labels, logits=logits)) == {"accuracy": 0.75}


def test_diversity_is_the_mean_distance_within_a_class():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0], [7.0, 7.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])  # class 2 has one image and no distance
    assert diversity(EvaluationSet(x, labels=labels)) == {"diversity": pytest.approx((5 + 1) / 2)}
    assert diversity(EvaluationSet(x[:2])) == {"diversity": pytest.approx(5)}


def test_a_collapsed_class_has_no_diversity():
    x = _features(3).repeat_interleave(4, 0)
    assert diversity(EvaluationSet(x, labels=torch.arange(3).repeat_interleave(4)))["diversity"] == 0


def test_mean_pairwise_distance_counts_no_point_with_itself():
    assert mean_pairwise_distance(torch.tensor([[0.0], [1.0], [3.0]])) == pytest.approx((1 + 3 + 2) / 3)


def test_sets_of_unequal_size_are_cut_to_one_size_without_losing_classes():
    """A reference sorted by class, as folders are: its first rows would be one class alone."""
    centres = torch.eye(10, 12).repeat_interleave(100, 0) * 50
    reference, generated = centres + _features(1000, 12), centres[::5] + _features(200, 12, seed=1)
    found = precision_recall(EvaluationSet(generated, reference))
    assert found["precision"] > 0.6
    assert found["recall"] > 0.6
    again = precision_recall(EvaluationSet(generated, reference))
    assert again == found


@pytest.mark.parametrize(
    ("metric", "missing"), [(fid, "reference"), (precision_recall, "reference"), (accuracy, "labels")]
)
def test_a_metric_says_what_it_lacks(metric, missing):
    with pytest.raises(UserError, match=f"needs {missing}"):
        metric(EvaluationSet(_features(20)))
