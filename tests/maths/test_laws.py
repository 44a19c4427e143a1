"""Laws of numbers in (0, 1) have the distributions that their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from fewstep.draws import Draw
from fewstep.maths.laws import Law

ROWS = 20_000


def drawn(**said) -> np.ndarray:
    return Law(**said).drawn(Draw(3, 0, np.arange(ROWS))).numpy()


def test_uniform_and_logit_normal():
    assert stats.kstest(drawn(), "uniform").pvalue > 0.01
    bell = drawn(kind="logit_normal", loc=0.8, scale=1.5)
    assert stats.kstest(torch.from_numpy(bell).double().logit().numpy(), "norm", args=(0.8, 1.5)).pvalue > 0.01


def test_mix_is_half_of_each():
    """P(u < x) = (x + Phi(logit x - loc)) / 2."""
    found = drawn(kind="mix", loc=0.8)
    for x in (0.1, 0.5, 0.9):
        expected = (x + stats.norm.cdf(np.log(x / (1 - x)) - 0.8)) / 2
        assert (found < x).mean() == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("said", [{"kind": "normal"}, {"scale": 0.0}, {"mean": 1.0}])
def test_other_words_are_refused(said):
    with pytest.raises(ValidationError):
        Law(**said)
