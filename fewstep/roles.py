"""Roles: which network plays the student, the teacher, the fake score, and what of it trains.

A method declares `Role`s; the recipe says with a `RoleSpec` where each comes from and how it is tuned; `assemble` gives
back `Handle`s. On a shared base a handle is a view `(module, adapter or none)`: teacher = no adapter, student and fake
score = two adapters on one copy of the weights. The adapter is part of the *call* (see `nets/lora.py`), never module
state, so nothing has to be switched and activation checkpointing recomputes with the adapter the forward had.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from .errors import UserError, nearest
from .maths.paths import Path
from .maths.scalars import Scalar
from .models.family import Loaded, Surroundings
from .models.folder import open_model
from .models.registry import FAMILIES
from .nets.extra_inputs import RELATIVE, reads, time_layers
from .nets.lora import Adapter, checkpointed, use

Tune = Literal["full", "lora", "frozen"]


class OptimizerSpec(BaseModel):
    """One optimiser a trainable role. `lr` may be a schedule; `warmup` and `decay` shape it over the stage.

    `adamw8bit` keeps its moments in a byte each, and needs bitsandbytes. `cosine_restarts` falls to `lr_floor` in
    `restart_every` steps, then anew in twice as many, and so on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Literal["adamw", "adam", "sgd", "adamw8bit"] = "adamw"
    lr: Scalar = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine", "linear", "cosine_restarts"] = "constant"
    restart_every: int = Field(default=1000, gt=0, description="steps of the first fall of cosine_restarts")
    lr_floor: float = Field(default=0.0, ge=0, description="where cosine_restarts falls to")
    clip: float | None = Field(default=1.0, description="largest gradient norm of this role; null = off")


class LoraSpec(BaseModel):
    """Low-rank adapters: y += alpha / rank * up(down(x)) on the modules whose name ends in one of `targets`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(default=16, gt=0)
    alpha: float | None = Field(default=None, description="default: the rank, so that the factor is 1")
    targets: Literal["default", "wide", "all"] | list[str] = "default"


class RoleSpec(BaseModel):
    """What a recipe may say about a role, e.g. `student: {from: teacher, tune: lora, lora: {rank: 32}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    source: str | None = Field(
        default=None, alias="from", description="folder, hub id, another role, or a family to build"
    )
    build: dict[str, Any] = Field(default={}, description="sizes, when `from` names a family")
    tune: Tune | None = None
    lora: LoraSpec = LoraSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    ema: float | None = Field(default=None, ge=0, lt=1, description="decay of the averaged copy; null = none")
    ema_warmup: bool = Field(default=False, description="the decay grows from 0 to `ema`: d += (1 - d) (ema - d) / 2")
    ema_half_life: float | None = Field(default=None, gt=0, description="in samples, instead of `ema`")
    ema_rampup: float | None = Field(default=0.05, gt=0, description="half-life at most so many times the samples seen")
    gradient_checkpointing: bool = False
    weights: Literal["float32", "bf16"] = Field(
        default="float32", description="as which a base that is not trained is held; bf16 takes train.precision: bf16"
    )

    @model_validator(mode="after")
    def _one_average(self) -> RoleSpec:
        if self.ema is not None and self.ema_half_life is not None:
            raise ValueError("ema and ema_half_life both say how weights are averaged: write ema: null with the second")
        return self

    @property
    def averages(self) -> bool:
        """Whether the role keeps an averaged copy."""
        return self.ema is not None or self.ema_half_life is not None


@dataclass(frozen=True)
class Role:
    """A role as its method declares it. `defaults` are the paper's values for the recipe's RoleSpec, below what a user writes.

    init: another role to start from (shared base when tuned by LoRA or frozen, a copy when tuned in full), or None: the
        recipe must say `from`. build: makes the module from the handles assembled so far (heads, projectors); such
        parts are dropped at export unless the method exports them.
    """

    name: str
    tune: Tune = "frozen"
    init: str | None = None
    build: Callable[[Mapping[str, Handle]], nn.Module] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    train_mode: bool = False  # dropout and BatchNorm live; score networks stay in eval mode
    like: str | None = None  # the recipe's key that speaks for this role, when several roles are tuned alike
    adds: tuple[str, ...] = ()  # inputs the network gains ("guidance"), fed so that at step 0 it equals what it was

    @property
    def key(self) -> str:
        """The recipe's key for this role."""
        return self.like or self.name


class Handle:
    """A network as a method sees it: call it like the module. `handle.module` is the base, `handle.adapter` may be None."""

    def __init__(
        self,
        role: Role,
        module: nn.Module,
        spec: RoleSpec,
        tune: Tune,
        adapter: Adapter | None = None,
        family: str | None = None,
        path: Path | None = None,
        origin: str | None = None,
        around: Surroundings | None = None,
    ):
        self.role, self.module, self.adapter, self.spec, self.tune = role, module, adapter, spec, tune
        self.family, self.path, self.origin, self.around = family, path, origin, around
        self.autocast: torch.dtype | None = None  # set by the trainer from train.precision
        self.forget: Callable[[], None] = lambda: None  # clears the optimiser's state, once there is one
        self.rewind: Callable[[], None] = lambda: None  # starts the learning rate's schedule again
        self.ema: dict[str, nn.Parameter] | None = None
        self.ema_decay = 0.0 if spec.ema_warmup else spec.ema or 0.0
        self.sharded = False  # whether each process holds a part of every trained parameter
        self.renew()

    def renew(self) -> None:
        """Looks up the trained parameters again, after the module's were replaced, and starts the average from them."""
        owner = self.adapter if self.adapter is not None else self.module
        found = owner.named_parameters()
        self._trainable = {} if self.tune == "frozen" else {n: p for n, p in found if p.requires_grad}
        self.sharded = any(hasattr(p, "full_tensor") for p in self._trainable.values())
        if self.spec.averages and self.tune != "frozen":
            self.ema = {n: nn.Parameter(p.detach().clone(), requires_grad=False) for n, p in self.trainable().items()}

    @property
    def name(self) -> str:
        """The role's name."""
        return self.role.name

    @property
    def shifted(self) -> bool:
        """Whether an adapter reads the second time from a shifted label (`models.denoiser.shifted_label`)."""
        return self.adapter is not None and "s" in self.role.adds and "s" not in reads(self.module)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def narrow(self) -> bool:
        """Whether its base is held in bfloat16."""
        return any(p.dtype == torch.bfloat16 for p in self.module.parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, seen through this role's adapter."""
        with use(self.adapter), self._precision():
            return self.module(*args, **kwargs)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:  # autocast knows no meta device, where a plan asks a network for its sizes
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def part(self, path: str) -> Callable[..., Any]:
        """A submodule under the same adapter: `teacher.part("layer4")(x)`. Gradients may flow through it."""
        module = self.module.get_submodule(path)

        def call(*args: Any, **kwargs: Any) -> Any:
            with use(self.adapter), self._precision():
                return module(*args, **kwargs)

        return call

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters this role's optimiser steps, by name. Empty for a frozen role."""
        return self._trainable

    def train_here(self, yes: bool) -> None:
        """Lets this role's parameters take part in gradients, or not: the trainer says it at the start of each stage."""
        for p in self._trainable.values():
            p.requires_grad_(yes)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this role: the adapter, or all parameters and buffers when tuned in full."""
        if self.tune == "frozen":
            return {}
        return dict((self.adapter if self.adapter is not None else self.module).state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, in place."""
        owner = self.adapter if self.adapter is not None else self.module
        own = owner.state_dict()
        cut = {name: part_of(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}
        owner.load_state_dict(cut, strict=True)

    @torch.no_grad()
    def update_ema(self, decay: float | None = None) -> None:
        """ema <- decay ema + (1 - decay) parameters. The decay: as told, or the recipe's, with its warm-up."""
        if self.ema is None:
            return
        if decay is None and self.spec.ema_warmup:
            self.ema_decay += 0.5 * (1 - self.ema_decay) * ((self.spec.ema or 0.0) - self.ema_decay)
        weight = 1 - (decay if decay is not None else self.ema_decay)
        parameters = self.trainable()
        torch._foreach_lerp_(list(self.ema.values()), [parameters[n].detach() for n in self.ema], weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the role computes with its EMA weights; without an EMA nothing changes.

        Modules are pointed at the averaged tensors, nothing is copied, so a consistency target may ask for this in
        every step. Graphs that were built outside keep the weights they were built with.
        """
        if self.ema is None:
            yield
            return
        if self.sharded:  # whole parameters are gathered from the parts, wherever modules point
            with _exchanged(self.trainable(), self.ema):
                yield
            return
        averages = {id(p): self.ema[name] for name, p in self.trainable().items()}
        places = [
            (held, name, p)
            for part in (self.adapter if self.adapter is not None else self.module).modules()
            for held in (part._parameters,)
            for name, p in held.items()
            if id(p) in averages  # by identity: tied weights have several places
        ]
        try:
            for held, name, p in places:
                held[name] = averages[id(p)]
            yield
        finally:
            for held, name, p in places:
                held[name] = p

    @torch.no_grad()
    def pull_towards(self, other: Handle, keep: float) -> None:
        """theta <- keep theta + (1 - keep) theta_other, name by name; both roles are tuned alike."""
        mine, theirs = self.trainable(), other.trainable()
        if mine.keys() != theirs.keys():
            raise UserError(
                f"'{self.name}' and '{other.name}' hold different parameters: tune both alike (lora of equal rank, or full)"
            )
        torch._foreach_lerp_(list(mine.values()), [theirs[n].detach() for n in mine], 1 - keep)

    @torch.no_grad()
    def assign(self, other: Handle) -> None:
        """Copies the other role's trained values into this one (restart of a fake score, swap of teachers)."""
        self.pull_towards(other, keep=0.0)

    @torch.no_grad()
    def restart(self, base: Handle) -> None:
        """Back to the weights of `base`, which this role started from, its optimiser forgets all and is at its first rate."""
        if self.adapter is not None:
            self.adapter.clear()
        else:
            self.module.load_state_dict(base.module.state_dict())
        self.forget()
        self.rewind()

    def fingerprint(self) -> str:
        """sha256 over the base weights' names, shapes and bytes; tells whether a folder still holds the same teacher."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            )
        return digest.hexdigest()


@contextmanager
def _exchanged(parameters: Mapping[str, nn.Parameter], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the parameters have the others' values."""
    with torch.no_grad():
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(others[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])


def merged(handle: Handle) -> nn.Module:
    """A copy of the base with the adapter folded into its weights; what `model/` holds. Uses EMA weights when there are any."""
    with handle.averaged():
        module = copy.deepcopy(handle.module)
        if handle.narrow:
            hold(module, torch.float32)  # in which the base is exact, and the sum is made
        if handle.adapter is not None:
            handle.adapter.merge_into(module)
    return module.requires_grad_(False)


def hold(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` itself, its parameters in `dtype`. Buffers, which are tables of places and frequencies, stay as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def part_of(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor where `other` is cut over processes (a DTensor), else the tensor itself."""
    if not hasattr(other, "full_tensor") or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]


def merge_spec(role: Role, spec: RoleSpec | None) -> RoleSpec:
    """The role's defaults with the recipe's words on top."""
    said = spec.model_dump(by_alias=True, exclude_unset=True) if spec is not None else {}
    usual = dict(role.defaults)
    for one, other in (("ema", "ema_half_life"), ("ema_half_life", "ema")):
        if said.get(one) is not None:
            usual.pop(other, None)  # two ways to say the same
    return RoleSpec.model_validate(_overlay(usual, said))


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in above.items():
        both = isinstance(below.get(key), Mapping) and isinstance(value, Mapping)
        below[key] = _overlay(dict(below[key]), value) if both else value
    return below


def assemble(
    roles: Sequence[Role],
    specs: Mapping[str, RoleSpec],
    seed: int,
    device: torch.device | str = "cpu",
    fit: Callable[[Handle], None] = lambda _: None,
) -> dict[str, Handle]:
    """Builds every role's network once and returns the handles, in the order in which they depend on each other.

    fit: told of each network as it comes, before parts are built on it.
    Raises UserError when a role has no source, a source does not exist, or roles start from each other in a circle.
    """
    handles: dict[str, Handle] = {}
    waiting = list(roles)
    names = {role.name for role in roles}
    while waiting:
        ready = [r for r in waiting if _needs(r, roles, specs) & names <= handles.keys()]
        if not ready:
            raise UserError(f"roles start from each other in a circle: {', '.join(r.name for r in waiting)}")
        for role in ready:
            handles[role.name] = _handle(role, merge_spec(role, specs.get(role.key)), handles, seed, device)
            fit(handles[role.name])
            waiting.remove(role)
    return {role.name: handles[role.name] for role in roles}


def _needs(role: Role, roles: Sequence[Role], specs: Mapping[str, RoleSpec]) -> set[str]:
    """Roles that must be there first: the one it starts from; for a built part, all that are declared before it."""
    source = _source(role, specs)
    if source is None and role.build is not None:
        return {other.name for other in roles[: list(roles).index(role)]}
    return {source} if source is not None else set()


def _source(role: Role, specs: Mapping[str, RoleSpec]) -> str | None:
    spec = specs.get(role.key)
    return (spec.source if spec is not None and spec.source else None) or role.defaults.get("from") or role.init


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Runs the block with torch's generators seeded from (seed, name), so that one role's init never moves another's."""
    number = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "little")
    with torch.random.fork_rng():
        torch.manual_seed(number)
        yield


def _handle(role: Role, spec: RoleSpec, handles: Mapping[str, Handle], seed: int, device: torch.device | str) -> Handle:
    tune = spec.tune or role.tune
    source = spec.source or role.init
    with seeded(seed, role.name):
        if source is not None and source in handles:
            return _from_role(role, spec, tune, handles[source])
        loaded = _load(role, spec, source, handles)
        module = _upgraded(loaded.module, role, loaded.family, tune).to(device)
        module = module.requires_grad_(tune == "full").train(role.train_mode)
        if spec.weights == "bf16":
            _check_untrained(role, tune)
            hold(module, torch.bfloat16)
        if spec.gradient_checkpointing:
            checkpointed(module)
        adapter = _adapter(module, spec, loaded.family, role).to(device) if tune == "lora" else None
    base = spec.build.get("base", source)  # of families that are made from another one's network
    origin = str(FilePath(base).resolve()) if base is not None and FilePath(base).is_dir() else base
    return Handle(role, module, spec, tune, adapter, loaded.family or None, loaded.path, origin, loaded.around)


def _check_untrained(role: Role, tune: Tune) -> None:
    if tune == "full":
        raise UserError(
            f"{role.name}.weights: bf16 is too coarse for weights that are trained: tune it by lora, or leave it"
        )


def _from_role(role: Role, spec: RoleSpec, tune: Tune, base: Handle) -> Handle:
    if spec.weights == "bf16":
        raise UserError(f"{role.name}.weights: it starts from {base.name}, so say {base.name}.weights")
    if tune != "full":  # one copy of the weights: a view
        _upgraded(base.module, role, base.family, tune)
        adapter = _adapter(base.module, spec, base.family, role).to(base.device) if tune == "lora" else None
        if spec.gradient_checkpointing:
            checkpointed(base.module)
        return Handle(role, base.module, spec, tune, adapter, base.family, base.path, base.origin, base.around)
    module = merged(base) if base.adapter is not None else copy.deepcopy(base.module)
    if base.narrow:
        hold(module, torch.float32)
    module = _upgraded(module, role, base.family, tune)
    module.requires_grad_(True).train(role.train_mode)
    if spec.gradient_checkpointing:
        checkpointed(module)
    return Handle(role, module, spec, tune, None, base.family, base.path, base.origin, base.around)


def _upgraded(module: nn.Module, role: Role, family: str | None, tune: Tune) -> nn.Module:
    """`module` with the inputs that the role adds; those that it reads already stay as they were trained.

    An adapter holds low-rank changes only and no new layer: it reads a second time and a sign from the label, and a
    guidance where the base does.
    """
    added = [name for name in role.adds if name not in reads(module)]
    if not added or (tune == "lora" and not reads(module) and set(added) <= set(RELATIVE)):
        return module
    known = FAMILIES.get(str(family))
    if added == ["guidance"] and known.embeds_guidance(module):
        return module
    if tune != "full":
        raise UserError(
            f"{role.name}.tune is {tune}, but the network gains an input ({', '.join(added)}): write tune: full, or "
            "switch the input off in `config`"
        )
    return known.upgrade(module, added)


def _load(role: Role, spec: RoleSpec, source: str | None, handles: Mapping[str, Handle]) -> Loaded:
    if source is None and role.build is not None:
        return Loaded(role.build(handles), family="")
    if source is None:
        raise UserError(f"role '{role.name}' has no weights: write `{role.name}: {{from: FOLDER}}` in the recipe")
    if source in FAMILIES:
        return FAMILIES.get(source).build(**spec.build)
    if spec.build:
        raise UserError(
            f"{role.name}.build goes with a family in {role.name}.from, not with '{source}': {nearest(source, FAMILIES.names())}"
        )
    return open_model(source)


def _adapter(module: nn.Module, spec: RoleSpec, family: str | None, role: Role) -> Adapter:
    known = FAMILIES.get(family) if family is not None else None
    targets = spec.lora.targets
    if isinstance(targets, str):
        targets = known.lora_targets(targets) if known is not None else ["*"]
    if role.adds and known is not None:
        targets = [*targets, *time_layers(module, known.facts.time_embedding)]  # labels mean something new
    return Adapter(module, rank=spec.lora.rank, alpha=spec.lora.alpha or float(spec.lora.rank), targets=targets)
