"""`yield` as a barrier: the generators of all micro-batches advance side by side.

Each part runs to its next yield; an `Update`'s backward runs at once and frees the graph; when all parts (and, through
`finish`, all ranks) have arrived, the roles step and the parts go on. A `Total` is added up and sent back in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..methods.base import Mean, Total, Update
from . import distributed
from .levels import binned

Part = Iterator[Update | Total]
Seed = tuple[int | str, ...]


class ContractError(RuntimeError):
    """A method breaks the contract: a bug in the method, never in a recipe."""


@dataclass
class Barrier:
    """What all parts together said at one yield: the update's roles, and sums over this rank's parts.

    levels: name -> [2, bins], sums and counts of rows by noise level.
    """

    roles: tuple[str, ...]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    levels: dict[str, Tensor] = field(default_factory=dict)
    keep: list[tuple[int, Mapping[str, Tensor]]] = field(default_factory=list)


@dataclass(frozen=True)
class Gradients:
    """How losses become gradients: which parameters a role has, and the weight of each term at this step.

    others: trained parameters of all roles but these.
    """

    parameters: Callable[[tuple[str, ...]], Sequence[nn.Parameter]]
    weight: Callable[[str], float]
    parts_in_step: int  # over all ranks
    others: Callable[[tuple[str, ...]], Sequence[nn.Parameter]] = lambda _: ()


def advance(
    parts: Sequence[Part], seeds: Sequence[Seed], gradients: Gradients, finish: Callable[[Barrier], None]
) -> None:
    """Runs one optimiser step: all parts to their end, calling `finish` at each Update barrier.

    seeds: per part, numbers that seed the global generators before each segment, so that dropout and library code do not
    depend on what ran before. Raises ContractError when parts yield different things.
    """
    reply: dict[str, Tensor] | None = None
    for segment in range(1_000_000):
        said = []
        for part, seed in zip(parts, seeds):
            item = _next(part, reply, (*seed, segment))
            # at once, so that one micro-batch's graph is alive at a time
            said.append(Said(item, backward(item, gradients)) if isinstance(item, Update) else Said(item, {}))
        reply, first = None, said[0].item
        if all(one.item is None for one in said):
            return
        if any(type(one.item) is not type(first) for one in said):
            raise ContractError("micro-batches yielded different things at one barrier: yields must not depend on data")
        if isinstance(first, Total):
            reply = distributed.sum_tensors(_add([dict(one.item) for one in said]))
            continue
        finish(_barrier(said))


class Said(NamedTuple):
    """What a part yielded, and for an update its unweighted terms; its gradients are added already."""

    item: Any
    terms: dict[str, Tensor]


def _next(part: Part, reply: dict[str, Tensor] | None, seed: Seed) -> Update | Total | None:
    seed_everything(seed)
    try:
        return part.send(reply)  # type: ignore[attr-defined]
    except StopIteration:
        return None


def seed_everything(seed: Seed) -> None:
    """Seeds Python's, numpy's and torch's global generators from a tuple of numbers and names."""
    number = int.from_bytes(blake2b(repr(seed).encode(), digest_size=8).digest(), "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    # torch.manual_seed asks every kind of device in turn, which costs fifty times as much
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def _barrier(said: Sequence[Said]) -> Barrier:
    barrier = Barrier(said[0].item.role_names)
    for index, (update, terms) in enumerate(said):
        if update.role_names != barrier.roles:
            raise ContractError(f"micro-batches step different roles: {barrier.roles} and {update.role_names}")
        numbers = {name: value.detach().float().mean() / len(said) for name, value in update.metrics.items()}
        barrier.metrics = _add([barrier.metrics, {**numbers, **terms}])
        barrier.levels = _add([barrier.levels, {name: binned(rows) for name, rows in update.levels.items()}])
        if update.keep:
            barrier.keep.append((index, update.keep))
    return barrier


def backward(update: Update, gradients: Gradients) -> dict[str, Tensor]:
    """Adds this part's gradients to the update's roles and to nothing else. Returns the unweighted terms, detached.

    A term of weight 0 is reported but takes no part in the gradient, so a NaN in a term that is off does no harm.
    """
    terms = {name: _term(name, loss, gradients.parts_in_step) for name, loss in update.losses.items()}
    weighted = [
        gradients.weight(name) * term
        for name, term in terms.items()
        if gradients.weight(name) != 0 and term.requires_grad
    ]
    if weighted:
        _add_gradients(torch.stack(weighted).sum(), update.role_names, gradients)
    ranks = distributed.world()
    return {f"loss.{name}": term.detach() * ranks for name, term in terms.items()}


def _add_gradients(loss: Tensor, roles: tuple[str, ...], gradients: Gradients) -> None:
    parameters = gradients.parameters(roles)
    if not any(isinstance(p, DTensor) for p in parameters):
        return torch.autograd.backward(loss, inputs=list(parameters))
    # a sharded network's parameters are made for each call, so gradients cannot be asked for by name
    torch.autograd.backward(loss)
    for p in gradients.others(roles):
        p.grad = None
    return None


def _term(name: str, loss: Tensor | Mean, parts: int) -> Tensor:
    if isinstance(loss, Mean):
        total = torch.where(loss.total == 0, torch.ones_like(loss.total), loss.total)
        return loss.value.sum() / total
    if loss.ndim != 1:
        raise ContractError(f"loss '{name}' has shape {tuple(loss.shape)}: give [rows], or Mean(value, total)")
    return loss.mean() / parts if len(loss) else loss.sum()


def _add(numbers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for named in numbers:
        for name, value in named.items():
            total[name] = total[name] + value if name in total else value
    return total
