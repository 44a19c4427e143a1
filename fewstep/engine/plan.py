"""What a recipe would hold in memory and run, worked out on weights without storage. Nothing is trained.

With P the bytes of a role's trained parameters, a role costs

    weights (what it adds: all of its network, or the adapter alone on a shared base)
    + P of gradients + k P of optimiser state (Adam 2, SGD with momentum 1) + P of EMA

and a run peaks at the weights and EMAs of all roles plus, over its stages, the largest gradients and optimiser state of
the roles that train together (`peak_bytes`). With the activations of a micro-batch, of which only one role's part of a step
is held at a time, that is `total_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.registry import SOURCES
from ..errors import UserError
from ..methods.base import Method, Stage
from ..recipe import Recipe, load_recipe
from ..roles import Handle, OptimizerSpec, assemble
from .activations import activations
from .sizes import cut, sizes


@dataclass(frozen=True)
class RolePlan:
    """One role. `parameters` of the network it computes with, `trained` of them; the rest in bytes.

    source: folder, family or role that its weights come from; "the method" when the method builds it.
    shares: the role on whose copy of the weights this one is a view, or None. weights: what the role adds to memory.
    activations: at the peak of this role's part of a step, above weights and gradients; None where they are not known.
    alone: weights, gradients, optimizer and ema if the role were a full network of its own, tuned in full if it trains.
    """

    name: str
    source: str
    shares: str | None
    tune: str
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int | None
    alone: Mapping[str, int]


@dataclass(frozen=True)
class StagePlan:
    """One stage. steps: None for one pass over the data (offline). batch = micro_batch x parts rows on one process."""

    name: str
    trains: tuple[str, ...]
    data: tuple[str, ...]
    steps: int | None
    batch: int
    micro_batch: int
    parts: int


@dataclass(frozen=True)
class Plan:
    """Roles, stages and peak bytes: with roles as views on shared bases (`peak_bytes`), or as full copies.

    total_bytes: with activations; None where a stage's could not be worked out, for the reason `unknown`.
    """

    method: str
    roles: tuple[RolePlan, ...]
    stages: tuple[StagePlan, ...]
    peak_bytes: int
    copies_bytes: int
    total_bytes: int | None
    unknown: str | None

    @property
    def ratio(self) -> float:
        """Full copies / views."""
        return self.copies_bytes / self.peak_bytes if self.peak_bytes else 1.0


def plan(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a recipe on one process. The same as `fewstep plan RECIPE a.b=c`.

    Raises UserError for whatever the recipe gets wrong about keys, values, folders, data sources and batches.
    """
    loaded = load_recipe(recipe, overrides)
    method = loaded.build_method()
    skipped = {name for name, patch in loaded.stages.items() if patch.skip}
    stages = [stage for stage in method.stages() if stage.name not in skipped]
    _check_sources(loaded, stages)
    described = tuple(_stage(stage, loaded, method) for stage in stages)
    handles = _handles(method, loaded, stages)
    rows = _roles(handles)
    working, unknown = _activations(method, handles, loaded, stages, described)
    roles = tuple(replace(r, activations=_of_role(r.name, working)) for r in rows)
    own = {
        r.name: {"weights": r.weights, "gradients": r.gradients, "optimizer": r.optimizer, "ema": r.ema} for r in roles
    }
    copies = {r.name: r.alone for r in roles}
    total = None if unknown else _total(own, described, working)
    return Plan(loaded.method, roles, described, _peak(own, described), _peak(copies, described), total, unknown)


Working = Mapping[str, Mapping[tuple[str, ...], int]]  # stage -> roles that step together -> bytes


def _activations(
    method: Method,
    handles: Mapping[str, Handle],
    recipe: Recipe,
    stages: Sequence[Stage],
    described: Sequence[StagePlan],
) -> tuple[Working, str | None]:
    """What `activations` finds of each stage that trains; or why it found nothing."""
    found: dict[str, Mapping[tuple[str, ...], int]] = {}
    try:
        for stage, said in zip(stages, described):
            if not stage.offline:
                found[stage.name] = activations(method, handles, recipe, stage, said.micro_batch, said.parts > 1)
    except UserError as error:
        return {}, str(error)
    except Exception as error:  # whatever a method needs that a plan has not: a reward's weights, stores, numbers
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found, None


def _of_role(name: str, working: Working) -> int | None:
    peaks = [size for stage in working.values() for roles, size in stage.items() if name in roles]
    return max(peaks, default=None)


def _total(costs: Mapping[str, Mapping[str, int]], stages: Iterable[StagePlan], working: Working) -> int:
    """Weights and EMAs stay, optimisers live as long as their stage, gradients and activations as long as their update."""
    held = sum(cost["weights"] + cost["ema"] for cost in costs.values())
    peaks = [0]
    for stage in stages:
        optimizers = sum(costs[r]["optimizer"] for r in stage.trains)
        updates = [
            size + sum(costs[r]["gradients"] for r in roles) for roles, size in working.get(stage.name, {}).items()
        ]
        peaks.append(optimizers + max(updates, default=0))
    return held + max(peaks)


def _check_sources(recipe: Recipe, stages: Iterable[Stage]) -> None:
    for config in recipe.data.values():
        SOURCES.get(str(config.get("source")))
    for stage in stages:
        missing = [name for name in _names(stage.data) if name not in recipe.data]
        if missing:
            raise UserError(
                f"stage '{stage.name}' reads data.{missing[0]}: write `data: {{{missing[0]}: {{source: ...}}}}`"
            )


def _names(data: str | tuple[str, ...]) -> tuple[str, ...]:
    return (data,) if isinstance(data, str) else tuple(data)


def _stage(stage: Stage, recipe: Recipe, method: Method) -> StagePlan:
    said = sizes(stage, recipe)
    if stage.offline:
        return StagePlan(stage.name, (), _names(stage.data), None, said.batch, said.batch, 1)
    parts = cut(said.batch, recipe, method)
    return StagePlan(stage.name, stage.trains, _names(stage.data), said.steps, said.batch, parts.micro, parts.parts)


def _handles(method: Method, recipe: Recipe, stages: Iterable[Stage]) -> dict[str, Handle]:
    """Every role that some stage uses, on the meta device; with storage where a network cannot be made without."""
    declared = method.roles()
    used = {name for s in stages for name in (s.uses if s.uses is not None else [r.name for r in declared])}
    roles = [role for role in declared if role.name in used]
    try:
        with torch.device("meta"):
            return assemble(roles, recipe.roles, recipe.train.seed, "meta")
    except (NotImplementedError, RuntimeError):  # a constructor that computes with its weights
        return assemble(roles, recipe.roles, recipe.train.seed)


def _roles(handles: Mapping[str, Handle]) -> tuple[RolePlan, ...]:
    owners: dict[int, str] = {}
    rows = []
    for name, handle in handles.items():
        owner = owners.setdefault(id(handle.module), name)
        rows.append(_role(handle, None if owner == name else owner))
    return tuple(rows)


def _role(handle: Handle, shares: str | None) -> RolePlan:
    base, adapter = (
        list(handle.module.parameters()),
        list(handle.adapter.parameters()) if handle.adapter is not None else [],
    )
    trained = list(handle.trainable().values())
    whole = _bytes([*base, *handle.module.buffers()])
    averaged = handle.spec.averages
    return RolePlan(
        name=handle.name,
        source=handle.spec.source or handle.role.init or "the method",
        shares=shares,
        tune=handle.tune,
        parameters=_count(base) + _count(adapter),
        trained=_count(trained),
        weights=_bytes(adapter) + (0 if shares else whole),
        **_training(handle.spec.optimizer, trained, averaged),
        activations=None,
        alone={"weights": whole, **_training(handle.spec.optimizer, base if trained else [], averaged)},
    )


def _training(spec: OptimizerSpec, trained: Sequence[Tensor], averaged: bool) -> dict[str, int]:
    size = _bytes(trained)
    return {"gradients": size, "optimizer": _optimizer(spec, trained), "ema": size if averaged else 0}


def _optimizer(spec: OptimizerSpec, trained: Sequence[Tensor]) -> int:
    if spec.name == "sgd":
        return _bytes(trained) if spec.momentum else 0
    if spec.name == "adamw8bit":
        return sum(_bytes_of_8bit(t) for t in trained)
    return 2 * _bytes(trained) + 4 * len(trained)  # two moments, and a float32 step counter a parameter


def _bytes_of_8bit(trained: Tensor) -> int:
    """Two moments: a byte each and a float32 for every 256, or float32 in parameters of fewer than 4096 numbers."""
    n = trained.numel()
    return 8 * n if n < 4096 else 2 * n + 8 * -(-n // 256)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _peak(costs: Mapping[str, Mapping[str, int]], stages: Iterable[StagePlan]) -> int:
    """Weights and EMAs stay; gradients and optimisers live as long as their stage."""
    held = sum(cost["weights"] + cost["ema"] for cost in costs.values())
    working = [sum(costs[r]["gradients"] + costs[r]["optimizer"] for r in stage.trains) for stage in stages]
    return held + max(working, default=0)
