"""Inception Score: its bounds, its streamed form, torch-fidelity's splits."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.inception_score import InceptionScore, inception_score


def _logits(n, classes=7, seed=0):
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def test_sure_and_even_classes_score_their_number_and_one_class_scores_one():
    sure = 1000 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=1)["inception_score"] == pytest.approx(5)
    assert inception_score(sure[:1].repeat(50, 1))["inception_score"] == pytest.approx(1)
    assert inception_score(torch.zeros(50, 5))["inception_score"] == pytest.approx(1)  # unsure of all


def test_it_is_the_exponential_of_the_mean_divergence_from_the_marginal():
    p = _logits(60).double().softmax(1)
    divergence = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert inception_score(_logits(60), splits=1)["inception_score"] == pytest.approx(divergence.exp().item())


@pytest.mark.parametrize("n", [57, 100])
def test_splits_are_those_of_torch_fidelity(n):
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    said = theirs.isc_features_to_metric(_logits(n))
    found = inception_score(_logits(n))
    assert found["inception_score"] == pytest.approx(said["inception_score_mean"], rel=1e-12)
    assert found["inception_score_std"] == pytest.approx(said["inception_score_std"], rel=1e-9)


def test_batches_do_not_change_the_number():
    logits, score = _logits(100), InceptionScore(100)
    for part in logits.split(13):
        score.update(part)
    assert score.value() == pytest.approx(inception_score(logits), rel=1e-12)


def test_a_wrong_number_of_images_is_refused():
    with pytest.raises(UserError, match="at least 10 images, not 9"):
        inception_score(_logits(9))
    score = InceptionScore(20)
    score.update(_logits(15))
    with pytest.raises(UserError, match="told of 20 images and got 15"):
        score.value()
    with pytest.raises(UserError, match="told of 20 images and got more"):
        score.update(_logits(6))
