"""The adaptive weight of a loss that changes in size with the noise level (EDM2, arXiv 2312.02696; sCM, arXiv 2410.11081).

    L = e^w(a) loss - w(a),   smallest over w where e^-w(a) = E[loss | a]

so every level contributes equally, whatever the loss there. Dropped when the student is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TERMS = 16


class WeightHead(nn.Module):
    """w(a) = sum_k c_k cos(2 k a), k = 0 .. 15: a cosine series on the angles [0, pi/2]; 0 before training.

    Linear in its 16 parameters, and L is convex in w: it has one minimum.
    """

    def __init__(self, terms: int = TERMS):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(terms))

    def forward(self, a: Tensor) -> Tensor:
        """w [rows] at angles a [rows] in radians."""
        k = torch.arange(len(self.coefficients), device=a.device)
        waves = (2 * a[:, None].to(self.coefficients.dtype) * k).cos()
        return (waves * self.coefficients).sum(1)  # no matmul: autocast would take one to bfloat16
