"""The contract between a method and the trainer.

A method is written for one micro-batch and reads like its paper. Its `train_step` is a generator: each `yield` is a
barrier that all micro-batches on all ranks reach together.

    yield Update("student", {"denoise": rows})     backward now; add up over parts and ranks; clip, step, EMA
    n = yield Total(tokens=mask.sum())             the sum of these numbers over parts and ranks

The sequence of yields depends on stage and step, never on data; an empty selection yields rows that are zero; there is
no `yield` inside a `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ..errors import nearest
from ..maths.scalars import Scalar
from ..maths.solvers import Schedule

if TYPE_CHECKING:
    from ..data.batch import Batch, Cond
    from ..draws import Draw
    from ..roles import Handle, Role
    from ..store import Store


@dataclass(frozen=True)
class Mean:
    """sum(value) / total, where `total` is the normaliser of the whole optimiser step (from a `Total`).

    `value` [rows] or a scalar is this part's sum; the trainer adds the parts up, so nothing is averaged twice.
    A total of zero is read as one: a fully masked step gives 0 and not NaN.
    """

    value: Tensor
    total: Tensor


class Total(dict[str, Tensor]):
    """A barrier that adds numbers up: `n = yield Total(tokens=mask.sum())` gives `n["tokens"]` over all parts and ranks."""


class Levels(NamedTuple):
    """A loss told apart by noise level: `rows` [rows] at flow times `t` [rows]."""

    rows: Tensor
    t: Tensor


@dataclass(frozen=True)
class Update:
    """A barrier that trains: backward through `losses`, add gradients up over parts and ranks, step `roles`.

    roles: only these receive gradient; it may flow *through* any other network.
    losses: term -> [rows] (averaged over the rows of the whole step) or `Mean`. Never a bare scalar. The trainer
        multiplies each term by its entry in `config.weights` (1 when absent).
    keep: name -> rows that go to the store of that name under the samples' ids.
    metrics: name -> tensor ([rows] or scalar); averaged and logged. Nothing here may force a host sync.
    levels: name -> rows of a loss and their noise levels; the report draws their means against t.
    """

    roles: str | tuple[str, ...]
    losses: Mapping[str, Tensor | Mean]
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    levels: Mapping[str, Levels] = field(default_factory=dict)

    @property
    def role_names(self) -> tuple[str, ...]:
        """`roles` as a tuple."""
        return (self.roles,) if isinstance(self.roles, str) else self.roles


@dataclass(frozen=True)
class Stage:
    """One run of a step function. `Method.stages()` lists them; the recipe's `stages:` may patch them by name.

    name: as in the log, the checkpoint and `fewstep train --stage NAME`.
    step: `step(batch, draw) -> Iterator[Update | Total]`, usually a bound method of the method.
    data: source names of the recipe's `data:`. One name: the batch itself; several: `batch.<name>` for each.
    trains: roles that are stepped here; every other role is frozen.
    steps: length; None means `train.steps` of the recipe.
    group: stages of one group share nothing; the group ends when all of them have ended.
    offline: the stage trains nothing and writes stores; it is skipped when a store made from equal inputs exists.
    writes: stores whose rows this stage's `keep` fills.
    reads: config fields an offline stage depends on, None for all: others may change without making its stores anew.
    uses: roles this stage calls, None for all. A role that no remaining stage uses is never loaded, so a run that starts
        from a ready store needs no teacher.
    batch, lr: in place of the recipe's `train.batch`, and a factor on each role's learning rate.

    Optimisers and learning-rate schedules start anew with every stage.
    """

    name: str
    step: Callable[[Batch, Draw], Iterator[Update | Total]]
    data: str | tuple[str, ...] = "train"
    trains: tuple[str, ...] = ()
    steps: int | None = None
    group: str | None = None
    offline: bool = False
    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] | None = None
    uses: tuple[str, ...] | None = None
    batch: int | None = None
    lr: float = 1.0


@dataclass(frozen=True)
class Selection:
    """Which samples a source serves from now on.

    ids: [n] int64 numbers handed to `source.fetch`. weights: [n] sample weights, or None for ones; they are served as
    `batch.weights`. Ids may repeat (a mixture is a longer list). group: so many neighbours in `ids` stay neighbours when
    the order is shuffled, and batches are cut between groups (several crops of one image).
    """

    ids: Tensor
    weights: Tensor | None = None
    group: int = 1


@dataclass(frozen=True)
class Event:
    """Something the trainer tells a method. `on` is the only place where a method changes state outside of an Update.

    kind: "stage_start" (also when a run resumes inside the stage, before its state is loaded), "epoch_start" and
        "epoch_end" (of `source`), "step_end", "stage_end".
    step: optimiser steps done in this stage; epoch: passes over the source.
    updated: roles stepped during this step, rows: of its global batch ("step_end").
    seed: of the run, for `select`'s own random choices.
    """

    kind: Literal["stage_start", "epoch_start", "step_end", "epoch_end", "stage_end"]
    stage: str
    step: int
    epoch: int = 0
    source: str | None = None
    updated: tuple[str, ...] = ()
    seed: int = 0
    rows: int = 0


class MethodConfig(BaseModel):
    """Knobs of a method, with the paper's defaults. `weights` multiplies loss terms by name: a number or a schedule.

    default_weights: below what a recipe says. terms: the names that may be weighted; None: any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    default_weights: ClassVar[Mapping[str, Scalar]] = {}
    terms: ClassVar[tuple[str, ...] | None] = None
    weights: dict[str, Scalar] = Field(default={}, validate_default=True)

    @field_validator("weights")
    @classmethod
    def _over_defaults(cls, said: dict[str, Scalar]) -> dict[str, Scalar]:
        unknown = [name for name in said if cls.terms is not None and name not in cls.terms]
        if unknown:
            raise ValueError(f"no loss term '{unknown[0]}': {nearest(unknown[0], cls.terms or ())}")
        return {**cls.default_weights, **said}


@dataclass(frozen=True)
class Paper:
    """Where a method comes from: title, arXiv id or DOI."""

    title: str
    id: str


class Method:
    """Base of all methods. Subclasses set the class variables, declare `roles`, and write `train_step` or `stages`.

    After construction the trainer calls `bind`: every role `name` becomes `self.<name>` and stores become
    `self.stores[<name>]`.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "method"  # "diffusion", "language", "vision": the word in `fewstep methods`
    paper: ClassVar[Paper | None] = None
    proven: ClassVar[Literal["measured", "unit", "reconstruction"]] = "unit"
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    row_multiple: int = 1  # batches are cut in named row parts
    batch_losses: ClassVar[bool] = False  # losses over the whole batch (InfoNCE): accumulation is refused
    draws: ClassVar[str] = "images"  # what `samples` are: who draws previews of them, see `engine.preview.ARTISTS`

    def __init__(self, config: MethodConfig | None = None):
        self.config: Any = config if config is not None else self.Config()
        self.stores: Mapping[str, Store] = {}
        self.sources: Mapping[str, Any] = {}

    def roles(self) -> tuple[Role, ...]:
        """The networks this method plays with. Asked before anything is loaded: depends on `config` alone."""
        raise NotImplementedError

    def store_names(self) -> tuple[str, ...]:
        """Stores this method reads or writes."""
        return ()

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Store]) -> None:
        """Gives the method its networks, sources and stores. Called once, before `stages`."""
        for name, handle in handles.items():
            setattr(self, name, handle)
        self.sources, self.stores = sources, stores

    def stages(self) -> Sequence[Stage]:
        """The runs of this method, in order. Default: `train_step` on the source `train`, training every trainable role."""
        return (Stage("train", self.train_step, trains=tuple(r.name for r in self.roles() if r.tune != "frozen")),)

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One optimiser step on one micro-batch."""
        raise NotImplementedError

    def select(self, source: str, event: Event) -> Selection | None:
        """Which samples `source` serves; asked at the start of a stage and of each epoch. None: all of them."""

    def on(self, event: Event) -> None:
        """Reacts to an event; the place for swaps, writes, restarts."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors of the method's own that a resumed run needs (thresholds, running statistics)."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""

    def validation(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows of numbers on held-out samples ("accuracy", "loss"); the trainer averages them. Runs without gradient."""
        return {}

    def samples(self, rows: int, seed: int) -> Tensor | None:
        """Generated rows for previews, guards and scores, images [rows, channels, height, width] in [-1, 1] unless `draws`
        says otherwise; None: does not generate."""

    def pictures(self, rows: int, seed: int) -> Mapping[str, Tensor]:
        """Further rows of images like those of `samples`, by what they show ("negative time"), for previews and report."""
        return {}

    def exported(self) -> str:
        """The role that `model/` holds."""
        return "student"

    def exported_module(self) -> nn.Module:
        """The network that `model/` holds: the exported role with its adapter folded in and its EMA weights, when it has them."""
        from ..roles import merged

        return merged(getattr(self, self.exported()))


class DiffusionMethod(Method):
    """A method whose roles of a known family are shown as flow networks: `self.student.velocity(x, t, cond)`."""

    kind = "diffusion"

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Store]) -> None:
        """Wraps every role that is a base model (or a copy or adapter of one) in a `Denoiser`."""
        from ..models.denoiser import Denoiser

        shown = {n: Denoiser.of(h) if h.path is not None else h for n, h in handles.items()}
        super().bind(shown, sources, stores)  # type: ignore[arg-type]

    def schedule(self) -> Schedule:
        """How the exported student is sampled; also what rollouts in training step through."""
        raise NotImplementedError

    def steps_offered(self) -> tuple[int, ...]:
        """Step counts at which the student was trained to be sampled."""
        return (self.schedule().steps,)

    def preview_cond(self, rows: int) -> Cond:
        """Conditions of the first samples of the source `train`."""
        return self.sources["train"].fetch(torch.arange(rows) % len(self.sources["train"]), None)["cond"]

    def samples(self, rows: int, seed: int, schedule: Schedule | None = None) -> Tensor:
        """Images of the exported role's own sampler, on the first conditions of the source `train`; image i has noise i.

        schedule: another than the method's own.
        """
        from ..draws import Draw
        from ..maths.solvers import sample

        role = getattr(self, self.exported())
        cond = self.preview_cond(rows).to(role.device)
        draw = Draw.for_images(seed, np.arange(rows), device=role.device)
        with role.averaged():
            return role.decode(sample(role, schedule or self.schedule(), cond, draw, role.shape(cond)))
