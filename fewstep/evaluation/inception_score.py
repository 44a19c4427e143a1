"""Inception Score (Salimans et al. 2016, arXiv 1606.03498) of a stream of class scores.

    IS = exp( mean_i KL( p(y | x_i) || mean_i p(y | x_i) ) ) = exp( H(mean p) - mean H(p) )

The second form needs two sums only, so nothing but them is kept. The value lies between 1 and the number of classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

SPLITS, SEED = 10, 2020  # those of torch-fidelity, whose shuffle is repeated


class InceptionScore:
    """Mean and spread of the score over `splits` parts of n images, which come in batches, in their order.

        score = InceptionScore(n=50_000)
        score.update(logits)           # [rows, classes], once for each batch
        score.value()                  # {"inception_score": 9.1, "inception_score_std": 0.1}

    Rows are dealt to the parts by a fixed shuffle. UserError when a part would be empty, or when not n rows came.
    """

    def __init__(self, n: int, splits: int = SPLITS, seed: int = SEED):
        if n < splits:
            raise UserError(f"inception_score in {splits} parts needs at least {splits} images, not {n}: raise n")
        place = np.argsort(np.random.RandomState(seed).permutation(n))  # of each row in the shuffled order
        bounds = np.array([part * n // splits for part in range(1, splits)])
        self.part = torch.from_numpy(np.searchsorted(bounds, place, side="right"))  # [n]
        self.n, self.splits, self.seen = n, splits, 0
        self._marginal: Tensor | None = None  # [splits, classes]: sum of p
        self._negentropy = torch.zeros(splits, dtype=torch.float64)  # sum of sum p log p

    def update(self, logits: Tensor) -> None:
        """Takes in the next rows [*, classes]."""
        if self.seen + len(logits) > self.n:
            raise UserError(f"inception_score was told of {self.n} images and got more: give their number as n")
        log_p = logits.detach().cpu().double().log_softmax(1)
        p, part = log_p.exp(), self.part[self.seen : self.seen + len(logits)]
        if self._marginal is None:
            self._marginal = torch.zeros(self.splits, p.shape[1], dtype=torch.float64)
        self._marginal.index_add_(0, part, p)
        self._negentropy.index_add_(0, part, (p * log_p).sum(1))
        self.seen += len(logits)

    def value(self) -> dict[str, float]:
        """`inception_score` and `inception_score_std`, over the parts."""
        if self._marginal is None or self.seen < self.n:
            raise UserError(f"inception_score was told of {self.n} images and got {self.seen}: give their number as n")
        rows = torch.bincount(self.part, minlength=self.splits)
        mean = self._marginal / rows[:, None]
        scores = (self._negentropy / rows - torch.xlogy(mean, mean).sum(1)).exp()
        return {"inception_score": scores.mean().item(), "inception_score_std": scores.std(correction=0).item()}


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = SEED) -> dict[str, float]:
    """The score of all images at once, from logits [n, classes]."""
    score = InceptionScore(len(logits), splits, seed)
    for part in logits.split(1024):
        score.update(part)
    return score.value()
