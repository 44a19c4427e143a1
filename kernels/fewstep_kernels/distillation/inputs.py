"""What a distillation loss is made of: a language-model head, a teacher's stored top k, a divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Rest = Literal["tail", "zero", "drop"]

KINDS: tuple[str, ...] = get_args(Kind)
RESTS: tuple[str, ...] = get_args(Rest)
FLOOR = -1e30  # log-probability of a word that is masked by -inf: keeps 0 * log 0 and its gradient at 0


@dataclass(frozen=True)
class Head:
    """Logits that are not made yet: hidden [..., D] @ weight [V, D]^T + bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[rows, V] in the dtype of the weights, from hidden [n, D]."""
        return F.linear(self.hidden[rows], self.weight, self.bias)


@dataclass(frozen=True)
class TopK:
    """The teacher's most probable words: ids [..., K], each at most once a row, and log_probs [..., K] at the loss's temperature.

    rest: where the mass 1 - sum p goes that was not stored.
        tail  into one more bucket, compared with the student's mass outside the K words; exact at K = V - 1
        zero  nowhere: p is divided by its sum, and words outside the K have probability 0
        drop  out of sight: p and the student's q are both divided by their sums over the K words
    """

    ids: Tensor
    log_probs: Tensor
    rest: Rest = "tail"


Teacher = Head | TopK | Tensor


@dataclass(frozen=True)
class Divergence:
    """Forward KL(p || q), reverse KL(q || p) or beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    p = softmax(teacher / temperature), q = softmax(student / temperature). factor: temperature^2 or 1.
    """

    kind: Kind
    beta: float
    temperature: float
    factor: float


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def teacher_logits(teacher: Head | Tensor, rows: slice, keep: Tensor) -> Tensor:
    """[rows, V], a tensor of its own. Rows that `keep` [n] leaves out are 0 whatever the teacher holds there."""
    logits = teacher.logits(rows) if isinstance(teacher, Head) else teacher[rows]
    return logits.masked_fill(~keep[rows, None], 0)


def teacher_buckets(top: TopK, rows: slice) -> Tensor:
    """log p of the K words, then (unless dropped) of the bucket of all others: [rows, K + 1 or K]."""
    log_p = wide(top.log_probs[rows])
    if top.rest == "tail":
        # Rounding of stored numbers may make the sum pass 1.
        others = torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1))
        return torch.cat([log_p, others], -1).clamp_min(FLOOR)
    log_p = log_p.log_softmax(-1)
    if top.rest == "drop":
        return log_p.clamp_min(FLOOR)
    return F.pad(log_p, (0, 1), value=FLOOR).clamp_min(FLOOR)
