"""Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al., 2002.09797).

R_i and F_j are the distances of real i and fake j to their k-th neighbour within their own set. With strict <:

    precision = mean_j [some i: |f_j - r_i| < R_i]        recall   = mean_i [some j: |f_j - r_i| < F_j]
    density   = sum_ij [|f_j - r_i| < R_i] / (k M)        coverage = mean_i [min_j |f_j - r_i| < R_i]

Two samples of one distribution, equal in size, have a coverage of about 1 - 2^-k. All comparisons are those of distances
summed term by term in float64. Most pairs are told apart by matrix products, which are many times faster and lose digits;
a pair too close to the edge of a ball for them is computed directly. Rows come in blocks, so memory is that of the
features and of a few blocks [1024, n].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

_BLOCK = 1024  # rows of the distance matrix held at a time
_PAIRS = 4096  # pairs computed directly at a time
_SPARE = 8  # neighbours looked at beyond the k-th, as the products may order near ties wrongly


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of features `fake` [m, d] against `real` [n, d].

    Raises UserError when a set has no k-th neighbour.
    """
    found = _Neighbourhoods.of(real, fake, k, closed=False)
    return {
        "precision": (found.balls > 0).double().mean().item(),
        "recall": found.recalled.double().mean().item(),
        "density": found.balls.double().mean().item() / k,
        "coverage": found.covered.double().mean().item(),
    }


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, float]:
    """`precision`, `recall`, `f_score` as torch-fidelity has them: with <= in place of <, and k = 3."""
    found = _Neighbourhoods.of(real, fake, k, closed=True)
    precision, recall = (found.balls > 0).double().mean().item(), found.recalled.double().mean().item()
    return {"precision": precision, "recall": recall, "f_score": 2 * precision * recall / max(precision + recall, 1e-5)}


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """Distance [n], float64, of each row of x [n, d] to its k-th nearest other row."""
    return _Points.of(x, _mean(x)).radii(k)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [n, m], summed term by term."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class _Points:
    """Rows as they came, and from the origin that products lose the fewest digits about."""

    raw: Tensor  # [n, d]
    centred: Tensor  # [n, d], float64
    squares: Tensor  # [n]: |centred|^2

    @classmethod
    def of(cls, raw: Tensor, origin: Tensor) -> _Points:
        centred = raw.double().sub(origin)
        return cls(raw, centred, torch.linalg.vector_norm(centred, dim=1).square())

    def radii(self, k: int) -> Tensor:
        """Distance [n] of each row to its k-th nearest other row."""
        return torch.cat([self._radii(rows, squares, k) for rows, squares in _blocks(self, self)])

    def _radii(self, rows: Tensor, squares: Tensor, k: int) -> Tensor:
        squares[torch.arange(len(rows)), rows] = torch.inf
        near = squares.topk(min(k + _SPARE, len(self.raw) - 1), largest=False, sorted=False).indices
        gaps = _direct(self, rows.repeat_interleave(near.shape[1]), self, near.flatten())
        return gaps.reshape(near.shape).sort(1).values[:, k - 1]


@dataclass(frozen=True)
class _Neighbourhoods:
    """balls [m]: number of real balls that each fake lies in. recalled [n]: whether a real row lies in some fake's ball.

    covered [n]: whether some fake lies in a real row's ball.
    """

    balls: Tensor
    recalled: Tensor
    covered: Tensor

    @classmethod
    def of(cls, real: Tensor, fake: Tensor, k: int, closed: bool) -> _Neighbourhoods:
        for name, rows in (("real", real), ("generated", fake)):
            if not 0 < k < len(rows):
                raise UserError(
                    f"prdc with k={k} needs more than {k} {name} samples, not {len(rows)}: raise n or lower k"
                )
        origin = _mean(real)
        reals, fakes = _Points.of(real, origin), _Points.of(fake, origin)
        real_radii, fake_radii = reals.radii(k), fakes.radii(k)
        balls = torch.zeros(len(fake), dtype=torch.int64)
        recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
        for rows, squares in _blocks(fakes, reals):
            held = _inside(squares, real_radii.expand_as(squares), fakes, rows, reals, closed)
            balls[rows], covered = held.sum(1), covered | held.any(0)
            around = fake_radii[rows, None].expand_as(squares)
            recalled |= _inside(squares, around, fakes, rows, reals, closed).any(0)
        return cls(balls, recalled, covered)


def _mean(x: Tensor) -> Tensor:
    return x.mean(0, dtype=torch.float64)


def _blocks(a: _Points, b: _Points) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows of a, their squared distances [rows, m] to b up to rounding)."""
    for rows in torch.arange(len(a.raw)).split(_BLOCK):
        squares = torch.addmm(b.squares, a.centred[rows], b.centred.T, alpha=-2)
        yield rows, squares.add_(a.squares[rows, None])


def _inside(squares: Tensor, radii: Tensor, a: _Points, rows: Tensor, b: _Points, closed: bool) -> Tensor:
    """Whether each distance [rows, m] is below its radius (closed: or equal to it)."""
    margin = squares - radii.square()
    found = margin < 0
    # d products of numbers up to the longest row, on either side of the comparison and in either form of the distance
    rounding = 8 * b.raw.shape[1] * torch.finfo(torch.float64).eps * max(x.squares.max().item() for x in (a, b))
    for pairs in (margin.abs_() <= rounding).nonzero().split(_PAIRS):
        i, j = pairs.T
        gaps, edge = _direct(a, rows[i], b, j), radii[i, j]
        found[i, j] = gaps <= edge if closed else gaps < edge
    return found


def _direct(a: _Points, i: Tensor, b: _Points, j: Tensor) -> Tensor:
    """Distances of row i of a to row j of b, pair by pair: equal pairs have equal ones, whichever set they come from."""
    pairs = zip(i.split(_PAIRS), j.split(_PAIRS))
    return torch.cat([(a.raw[p].double() - b.raw[q].double()).square().sum(1).sqrt() for p, q in pairs])
