"""Pair distances told from residues' features: an auxiliary task that teaches a structure model its geometry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BINS, FARTHEST = 64, 1.0  # equal bins up to 1 nm, the last one open


class Distogram(nn.Module):
    """Logits [rows, residues, residues, 64] over distances of CA pairs, symmetric in the pair.

    features: width of the residues' representation.
    """

    def __init__(self, features: int, width: int = 32):
        super().__init__()
        self.left, self.right = nn.Linear(features, width), nn.Linear(features, width)
        self.bins = nn.Linear(width, BINS)

    def forward(self, h: Tensor) -> Tensor:
        """h [rows, residues, features]"""
        one_way = self.left(h)[:, :, None] * self.right(h)[:, None]
        return self.bins(one_way + one_way.transpose(1, 2))


def distogram_rows(logits: Tensor, x0: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the true distances' bins, mean over pairs of different residues, [rows].

    logits [rows, residues, residues, 64]; x0 [rows, residues, 3] in nanometres; mask [rows, residues].
    """
    edges = torch.linspace(0, FARTHEST, BINS, device=x0.device)[1:]
    found = torch.bucketize(torch.cdist(x0, x0), edges)
    loss = F.cross_entropy(logits.float().flatten(0, 2), found.flatten(), reduction="none").view(found.shape)
    pairs = mask[:, :, None] & mask[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return (loss * pairs).flatten(1).sum(1) / pairs.flatten(1).sum(1).clamp_min(1)
