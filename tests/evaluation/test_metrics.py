"""Metrics by name on sets whose scores are known."""

from dataclasses import replace

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.fid import Moments
from fewstep.evaluation.inception_score import inception_score as score_of_classes
from fewstep.evaluation.metrics import (
    EvaluationSet,
    accuracy,
    diversity,
    fid,
    high_frequency,
    inception_score,
    kid,
    mean_pairwise_distance,
    precision_recall,
    prompt_diversity,
    reward,
    torch_fidelity_prc,
)
from fewstep.evaluation.registry import METRICS
from fewstep.evaluation.statistics import Statistics
from fewstep.rewards.base import Reward

NAMES = {
    "kid": {"kid", "kid_std"},
    "inception_score": {"inception_score", "inception_score_std"},
    "prdc": {"precision", "recall", "density", "coverage"},
    "prc": {"prc_precision", "prc_recall", "prc_f_score"},
}


class Same:
    """A feature network whose features are what it is shown."""

    name, impl, version, sha256, resize = "same", "fewstep", "1", "0", "none"

    def __init__(self, logits=None):
        self.says, self.calls = logits, 0

    def features(self, images):
        self.calls += 1
        return images.flatten(1).float()

    def logits(self, images):
        return self.says


class Brightness(Reward):
    """Mean pixel plus ten times the label, plus the length of the prompt."""

    name = "brightness"

    def score(self, images, asked):
        labels = 0 if asked.labels is None else asked.labels
        return images.mean((1, 2, 3)) + 10 * labels + (0 if asked.prompts is None else len(asked.prompts[0]))


def _features(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _set(features, reference=None, labels=None, logits=None):
    return EvaluationSet(features, reference, labels, network=Same(logits))


def _pixels(n, seed=0):
    return torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_every_metric_gives_numbers_under_its_names():
    labels = torch.arange(40) % 4
    data = EvaluationSet(
        _pixels(40), _pixels(50, 1), labels, ["a"] * 40, network=Same(torch.eye(4)[labels]), judge=Brightness()
    )
    for name in METRICS.names():
        values = METRICS.get(name)(data)
        assert values.keys() == NAMES.get(name, {name})
        assert all(isinstance(value, float) for value in values.values())


def test_features_are_computed_once_and_only_for_metrics_that_read_them():
    network = Same()
    data = EvaluationSet(_pixels(70), _pixels(80, 1), network=network, judge=Brightness())
    high_frequency(data), reward(data)
    assert network.calls == 0
    diversity(data), fid(data), precision_recall(data)
    assert network.calls == 2  # the images, the reference


def test_real_images_are_loaded_once_and_only_for_metrics_that_read_them():
    loads = []
    data = EvaluationSet(_pixels(9), lambda: loads.append(1) or _pixels(9), judge=Brightness(), network=Same())
    reward(data), diversity(data)
    assert loads == []
    high_frequency(data), fid(data)
    assert loads == [1]


def test_pixels_and_rewards_need_no_feature_network():
    data = EvaluationSet(_pixels(9), _pixels(9), judge=Brightness())
    assert high_frequency(data) == {"high_frequency": 1}
    assert reward(data)["reward"] == pytest.approx((_pixels(9).float() / 127.5 - 1).mean().item(), abs=1e-6)
    with pytest.raises(UserError, match="no feature network is named"):
        fid(data)


def test_high_frequency_is_one_for_natural_images_and_leaves_it_with_noise_and_blur():
    from fewstep.data.images import to_uint8
    from fewstep.data.registry import make_source

    x = make_source({"source": "digits"}).fetch(torch.arange(400), None)["x0"]
    real, others = to_uint8(x[200:]), x[:200]
    noisy = others + 0.5 * torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(others, 3, 1, 1)

    def ratio(images):
        return high_frequency(EvaluationSet(to_uint8(images), real))["high_frequency"]

    assert ratio(others) == pytest.approx(1, abs=0.1)
    assert ratio(noisy) > 1.25
    assert ratio(blurred) < 0.5


def test_flat_reference_images_have_no_high_frequencies_to_compare_with():
    with pytest.raises(UserError, match="flat"):
        high_frequency(EvaluationSet(_pixels(4), torch.full((4, 3, 8, 8), 7, dtype=torch.uint8)))


def test_a_reward_is_asked_with_the_label_and_prompt_of_each_image():
    """More images than one pass takes, so that what was asked is cut along with them."""
    images, labels = _pixels(1).repeat(150, 1, 1, 1), torch.arange(150)
    dark = (images[:1].float() / 127.5 - 1).mean().item()
    assert reward(EvaluationSet(images, labels=labels, judge=Brightness()))["reward"] == pytest.approx(745 + dark)
    prompted = EvaluationSet(images, prompts=["ab"] * 64 + ["a"] * 86, judge=Brightness())
    assert reward(prompted)["reward"] == pytest.approx((64 * 2 + 86) / 150 + dark)


def test_accuracy_is_the_share_of_images_in_the_class_asked_for():
    labels = torch.tensor([0, 1, 2, 2])
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    assert accuracy(_set(_features(4), labels=labels, logits=logits)) == {"accuracy": 0.75}


def test_diversity_is_the_mean_distance_within_a_class():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0], [7.0, 7.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])  # class 2 has one image and no distance
    assert diversity(_set(x, labels=labels)) == {"diversity": pytest.approx((5 + 1) / 2)}
    assert diversity(_set(x[:2])) == {"diversity": pytest.approx(5)}


def test_prompt_diversity_is_the_mean_distance_of_images_of_one_prompt():
    x = torch.tensor([[0.0, 0.0], [100.0, 0.0], [3.0, 4.0], [100.0, 1.0], [7.0, 7.0]])
    data = EvaluationSet(x, prompts=["a", "b", "a", "b", "c"], network=Same())
    assert prompt_diversity(data) == {"prompt_diversity": pytest.approx((5 + 1) / 2)}
    with pytest.raises(UserError, match="two images of some prompt"):
        prompt_diversity(EvaluationSet(x, prompts=list("abcde"), network=Same()))


def test_statistics_stand_for_the_reference_images():
    x, y = _features(40), _features(60, seed=1)
    made = Statistics.of(Moments.of(y), Same())
    data = EvaluationSet(x, network=Same(), statistics=made)
    assert fid(data) == fid(_set(x, y))
    with pytest.raises(UserError, match="statistics' resize is 'clean'"):
        fid(replace(data, statistics=replace(made, resize="clean")))


def test_the_inception_score_reads_the_networks_own_classes():
    """From the features where the network can: one pass serves FID and the score."""
    x, network = _features(40), Same()
    network.class_scores = lambda features: features[:, :3]
    found = inception_score(EvaluationSet(x, network=network))
    assert found == score_of_classes(x[:, :3])
    assert network.calls == 1


def test_a_collapsed_class_has_no_diversity():
    x = _features(3).repeat_interleave(4, 0)
    assert diversity(_set(x, labels=torch.arange(3).repeat_interleave(4)))["diversity"] == 0


def test_mean_pairwise_distance_counts_no_point_with_itself():
    assert mean_pairwise_distance(torch.tensor([[0.0], [1.0], [3.0]])) == pytest.approx((1 + 3 + 2) / 3)


def test_sets_of_unequal_size_are_cut_to_one_size_without_losing_classes():
    """A reference sorted by class, as folders are: its first rows would be one class alone."""
    centres = torch.eye(10, 12).repeat_interleave(100, 0) * 50
    reference, generated = centres + _features(1000, 12), centres[::5] + _features(200, 12, seed=1)
    found = precision_recall(_set(generated, reference))
    assert found["precision"] > 0.6
    assert found["recall"] > 0.6
    again = precision_recall(_set(generated, reference))
    assert again == found


@pytest.mark.parametrize(
    ("metric", "missing"),
    [
        (fid, "reference"),
        (precision_recall, "reference"),
        (accuracy, "labels"),
        (high_frequency, "reference_images"),
        (reward, "judge"),
        (kid, "reference"),
        (torch_fidelity_prc, "reference"),
        (prompt_diversity, "prompts"),
        (inception_score, "class_scores"),
    ],
)
def test_a_metric_says_what_it_lacks(metric, missing):
    with pytest.raises(UserError, match=f"needs {missing}"):
        metric(_set(_features(20)))
