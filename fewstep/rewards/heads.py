"""The last layers of learned scores: a chain of linear layers on an embedding, down to one number."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class LinearChain(nn.Module):
    """y = W_n (... (W_1 x + b_1) ...) + b_n, [rows, widths[0]] -> [rows], in float32 under any autocast.

    Nothing stands between the layers (in training there was dropout), so the whole is one affine map.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        """[rows]"""
        with torch.autocast(x.device.type, enabled=False):
            return self.layers(x.float()).squeeze(-1)


def chain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a chain under our names: of `weight`, `bias` alone, or of `...layers.0.weight, ...layers.2.weight, ...`
    with the gaps that dropout layers left."""
    numbers = {name: [int(n) for n in re.findall(r"\d+", name)][-1:] or [0] for name in state}
    order = {number: i for i, number in enumerate(sorted({n[0] for n in numbers.values()}))}
    return {f"layers.{order[numbers[name][0]]}.{name.split('.')[-1]}": tensor for name, tensor in state.items()}


def widths_of(state: Mapping[str, Tensor]) -> list[int]:
    """Widths from the input to the output of a chain under our names."""
    weights = [state[f"layers.{i}.weight"] for i in range(len(state) // 2)]
    return [weights[0].shape[1], *(w.shape[0] for w in weights)]
