"""Losses per row: every function takes [rows, ...] and gives [rows], the mean over a row's elements.

Inputs below float32 are raised to it first; float64 stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, nearest


def rows_mean(x: Tensor) -> Tensor:
    """Mean over all elements of each row, [rows]."""
    return x if x.ndim == 1 else x.flatten(1).mean(1)


def mse_rows(a: Tensor, b: Tensor) -> Tensor:
    """mean (a - b)^2."""
    return rows_mean((_wide(a) - _wide(b)) ** 2)


def l1_rows(a: Tensor, b: Tensor) -> Tensor:
    """mean |a - b|."""
    return rows_mean((_wide(a) - _wide(b)).abs())


def pseudo_huber_rows(a: Tensor, b: Tensor, c: float) -> Tensor:
    """mean ( sqrt((a - b)^2 + c^2) - c ), c > 0: quadratic below c, linear above (LCM, arXiv 2310.04378, c = 0.001).

    Computed as e^2 / (sqrt(e^2 + c^2) + c): the printed difference loses all digits for small e.
    """
    square = (_wide(a) - _wide(b)) ** 2
    return rows_mean(square / (torch.sqrt(square + c * c) + c))


def pseudo_huber_norm_rows(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c with |.| the norm of a whole row (improved consistency training, arXiv 2310.14189, eq. 8).

    The paper's c is .00054 sqrt(elements of a row). Unlike `pseudo_huber_rows` a row's elements share one kink.
    """
    square = ((_wide(a) - _wide(b)) ** 2).flatten(1).sum(1)
    return square / (torch.sqrt(square + c * c) + c)


def cosine_rows(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a, b), each row taken as one vector."""
    return 1 - F.cosine_similarity(_wide(a).flatten(1), _wide(b).flatten(1), dim=1)


def cross_entropy_rows(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-sum_v q_v log softmax(logits)_v over the last dimension: [..., V] -> [...], so [rows, V] -> [rows].

    target: class ids [...] or probabilities [..., V]; q = (1 - label_smoothing) target + label_smoothing / V.
    """
    flat = _wide(logits).flatten(0, -2)
    wanted = target.flatten() if target.ndim == logits.ndim - 1 else target.to(flat.dtype).flatten(0, -2)
    loss = F.cross_entropy(flat, wanted, reduction="none", label_smoothing=label_smoothing)
    return loss.reshape(logits.shape[:-1])


def pull(x: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x - sg[x + direction])^2: its gradient is -direction / (elements of a row), its value means nothing.

    The surrogate that applies a given update direction to a generator (DMD2, arXiv 2405.14867).
    """
    x = _wide(x)
    return 0.5 * mse_rows(x, (x + direction).detach())


def mean_variance_rows(x: Tensor, mean: float, var: float) -> Tensor:
    """0.5 [ (s2 + (mu - mean)^2) / var - 1 - log(s2 / var) ] with mu, s2 the mean and variance of a row's elements.

    KL of N(mu, s2) from N(mean, var): zero exactly where both agree (Decoupled DMD, arXiv 2511.22677).
    """
    x = _wide(x).flatten(1)
    mu, s2 = x.mean(1), x.var(1, correction=0)
    ratio = s2.clamp_min(torch.finfo(s2.dtype).tiny) / var  # a constant row has no finite value
    return 0.5 * (ratio + (mu - mean) ** 2 / var - 1 - ratio.log())


GENERATOR: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softplus": lambda fake: F.softplus(-fake),
    "hinge": lambda fake: -fake,
    "linear": lambda fake: -fake,
    "margin": lambda fake: F.relu(1 - fake),
}
DISCRIMINATOR: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softplus": lambda real, fake: F.softplus(-real) + F.softplus(fake),
    "hinge": lambda real, fake: F.relu(1 - real) + F.relu(1 + fake),
    "linear": lambda real, fake: fake - real,
}


def generator_rows(fake: Tensor, kind: str = "softplus") -> Tensor:
    """Adversarial loss of a generator from its logits [rows, ...]: softplus(-D(fake)); -D(fake) (hinge, linear);
    relu(1 - D(fake)) (margin, the counterpart of a hinge discriminator in PCM, arXiv 2405.18407)."""
    return rows_mean(_adversarial(GENERATOR, kind)(_wide(fake)))


def discriminator_rows(real: Tensor, fake: Tensor, kind: str = "softplus") -> Tensor:
    """Loss of a discriminator from logits of paired real and fake rows [rows, ...].

    softplus: softplus(-real) + softplus(fake); hinge: relu(1 - real) + relu(1 + fake); linear: fake - real, which needs
    a penalty on the discriminator since it has no lower bound. Raises UserError for another kind.
    """
    return rows_mean(_adversarial(DISCRIMINATOR, kind)(_wide(real), _wide(fake)))


def _adversarial(table: Mapping[str, Callable[..., Tensor]], kind: str) -> Callable[..., Tensor]:
    if kind not in table:
        raise UserError(f"unknown adversarial loss '{kind}': {nearest(kind, table)}")
    return table[kind]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
